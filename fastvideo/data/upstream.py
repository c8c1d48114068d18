# SPDX-License-Identifier: Apache-2.0
"""Reads the Parquet of upstream FastVideo's preprocessing and says what is wrong in it.

Such files have many rows in one row group, compressed and dictionary encoded, so a row cannot be
read by itself: columns are streamed from their beginning. Nothing in them says which VAE or text
encoder made them. A row that cannot be used is described, not raised; a file that cannot is raised.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo import hashing
from fastvideo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = {
    "vae_latent": 4,
    "text_embedding": 2,
    "clip_feature": 2,
    "first_frame_latent": 4,
    "pil_image": 3,
}
"""Tensors by the stem of their columns, with their number of axes: (C, T, Y, X) raw latent,
(L, D) text, (N, D) image features, (C, T, Y, X) normalised latent of the first frame followed by
grey, and (C, H, W) first frame."""

TRAINING_FOLDERS = ("combined_parquet_dataset", "training_dataset")
VALIDATION_FOLDERS = ("validation_dataset", "validation_parquet_dataset")

_EMPTY = {"vae_latent": "empty_latent", "text_embedding": "empty_text"}
"""Tensors that every clip has, with the reason why one without cannot be used."""

_CORE_COLUMNS = (
    "id",
    "caption",
    *(f"{stem}_{part}" for stem in _EMPTY for part in ("bytes", "shape")),
)
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
_ROWS_AT_ONCE = 8
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredClip:
    """A row of one of upstream's files, without its tensors.

    Attributes:
        file: Relative to the folder of the source.
        row: Counted from 0 in the file.
        id: As stored, with or without the suffix of the video; may repeat in other rows.
        caption: That of ``text_embedding``.
        width: Of the clip in pixels, 0 if the row does not say. Upstream's older preprocessing
            swaps width and height; the longer side is taken to be that of the latent.
        height: Like ``width``.
        num_latent_frames: From the shape of the latent: the column of that name holds latent or
            pixel frames, depending on what wrote it.
        fps: As stored, which is that of the video, not that of the frames taken; 0 if unknown.
        duration_s: As stored, 0 if unknown.
        latent_shape: (C, T, Y, X).
        text_shape: (L, D), L being the tokens that were not padding.
        tensors: Stems of the tensors that the row has.
        sha256: Of caption and tensors; equal for rows with the same content.
        fault: Why the row cannot be used, in snake_case, and the value that is at fault.
    """

    file: str
    row: int
    id: str
    caption: str
    width: int
    height: int
    num_latent_frames: int
    fps: float
    duration_s: float
    latent_shape: tuple[int, ...]
    text_shape: tuple[int, ...]
    tensors: frozenset[str]
    sha256: str
    fault: tuple[str, str] | None


def parquet_files(root: Path) -> tuple[Path, ...]:
    """Return the Parquet files with training rows, relative to ``root`` and sorted.

    ``root`` is what upstream calls the output folder, or any folder below it. Validation rows and
    hidden files are left out.

    Raises:
        UserError: There are none, or ``root`` holds the output of both of upstream's stacks.
    """
    if not root.is_dir():
        raise UserError(f"{root}: is no folder; set source.path to one that holds Parquet files")
    present = [name for name in TRAINING_FOLDERS if (root / name).is_dir()]
    if len(present) > 1:
        raise UserError(
            f"{root}: holds both {' and '.join(present)}, which may be the same clips twice; set "
            "source.path to one of them"
        )
    searched = root.joinpath(*present)
    found = (path.relative_to(root) for path in searched.rglob("*.parquet") if path.is_file())
    files = tuple(sorted(file for file in found if not _left_out(file)))
    if not files:
        raise UserError(
            f"{searched}: holds no *.parquet file to train on; set source.path to the output "
            "folder of FastVideo's preprocessing"
        )
    return files


def read_clips(root: Path, file: Path | str) -> list[StoredClip]:
    """Describe every row of a file, keeping no tensor.

    Memory: about three times the largest tensor column of a row group.

    Args:
        root: The folder of the source.
        file: Relative to it.

    Raises:
        UserError: The file is not whole, or lacks columns that every clip needs.
    """
    path = root / file
    with _opened(path) as parquet:
        _require_columns(path, parquet.schema_arrow)
        values = _values(parquet, ("id", "caption", "width", "height", "fps", "duration_sec"))
        stored = [_stored(parquet, stem) for stem in TENSORS]
        rows = range(parquet.metadata.num_rows)
    return [
        _clip(
            (Path(file).as_posix(), row),
            {name: column[row] for name, column in values.items()},
            [column[row] for column in stored],
        )
        for row in rows
    ]


def read_tensors(
    root: Path, file: Path | str, rows: Sequence[int], *, only: Collection[str] = tuple(TENSORS)
) -> Iterator[dict[str, "Tensor"]]:
    """Yield the tensors that each of ``rows`` has, by stem, in their stored type.

    Memory: about three times the wanted columns of a row group.

    Args:
        root: The folder of the source.
        file: Relative to it.
        rows: Ascending, without faults.
        only: Stems of the tensors to read.

    Raises:
        UserError: The file is not whole, or no longer what ``read_clips`` saw.
    """
    assert list(rows) == sorted(set(rows)), "rows must ascend"
    path = root / file
    with _opened(path) as parquet:
        _require_columns(path, parquet.schema_arrow)
        if rows and rows[-1] >= parquet.metadata.num_rows:
            raise _changed(path, rows[-1], f"there are {parquet.metadata.num_rows} rows")
        stems = [stem for stem in only if not _missing(parquet, stem)]
        for row, batch in _single_rows(parquet, rows, stems):
            try:
                yield _tensors(batch, stems)
            except _Damaged as damage:
                raise _changed(path, row, damage.detail) from None


class _Damaged(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class _Stored:
    """What a row says of one tensor. ``missing`` names a column that the others need."""

    stem: str
    bytes: int = 0
    shape: tuple[int | None, ...] = ()
    declared: str = ""
    missing: str = ""
    sha256: str = ""

    def dtype(self) -> str | None:
        """Return the type its bytes are in, None if the row has no such tensor."""
        if self.missing:
            raise _Damaged("missing_column", f"{self.missing} is missing")
        if self._absent():
            if self.stem in _EMPTY:
                raise _Damaged(
                    _EMPTY[self.stem],
                    f"{self.stem} has {self.bytes} bytes, shape {list(self.shape)}",
                )
            return None
        shape = self.checked_shape()
        dtype = self._checked_dtype(math.prod(shape))
        if self.bytes != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise _Damaged(
                "wrong_byte_count",
                f"{self.stem} has {self.bytes} bytes, not those of {list(shape)} in {dtype}",
            )
        return dtype

    def checked_shape(self) -> tuple[int, ...]:
        shape = tuple(length for length in self.shape if length is not None and length > 0)
        if len(shape) != len(self.shape):
            raise _Damaged("bad_shape", f"{self.stem}_shape is {list(self.shape)}")
        if len(shape) != TENSORS[self.stem]:
            raise _Damaged(
                "wrong_rank",
                f"{self.stem}_shape {list(shape)} has {len(shape)} axes, not {TENSORS[self.stem]}",
            )
        return shape

    def _absent(self) -> bool:
        """Upstream writes b"", [] and "" for what a row does not have."""
        return self.bytes == 0 and (self.stem in _EMPTY or not self.shape or 0 in self.shape)

    def _checked_dtype(self, count: int) -> str:
        dtype = self.declared.removeprefix("torch.") or "float32"  # upstream reads all as float32
        image = self.stem == "pil_image"
        if dtype not in _ITEM_BYTES or (dtype == "uint8" and not image):
            raise _Damaged("unknown_dtype", f"{self.stem}_dtype is {self.declared!r}")
        # Upstream's newer preprocessing keeps the image in bytes where it promises floats.
        return "uint8" if image and dtype == "float32" and self.bytes == count else dtype


def _left_out(file: Path) -> bool:
    return any(part.startswith(".") or part in VALIDATION_FOLDERS for part in file.parts)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    fix = "make or download it again, or move it out of source.path"
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as parquet:
            yield parquet
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: is not a whole Parquet file ({error}); {fix}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's fault; damage found by Arrow has no number
            raise
        raise UserError(f"{path}: is damaged ({error}); {fix}") from error


def _require_columns(path: Path, schema: pa.Schema) -> None:
    missing = [name for name in _CORE_COLUMNS if name not in schema.names]
    if missing:
        raise UserError(
            f"{path}: lacks {', '.join(missing)}; a clip needs its latent and its text embedding, "
            "in the columns of FastVideo's T2V or I2V preprocessing"
        )
    for field in schema:
        if not _readable(field):
            raise UserError(
                f"{path}: column {field.name} is of type {field.type}, unlike FastVideo's"
            )


def _readable(field: pa.Field) -> bool:
    """Whether a column that is read is of upstream's type or of one as good."""
    kind, (stem, _, part) = field.type, field.name.rpartition("_")
    match part if stem in TENSORS else field.name:
        case "id" | "caption" | "dtype":
            return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
        case "bytes":
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
        case "shape":
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            return bool(is_list and pa.types.is_integer(kind.value_type))
        case "width" | "height":
            return bool(pa.types.is_integer(kind))
        case "fps" | "duration_sec":
            return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
    return True


def _values(parquet: pq.ParquetFile, names: Sequence[str]) -> dict[str, list[Any]]:
    """Whole columns by name, those that the file has."""
    names = [name for name in names if name in parquet.schema_arrow.names]
    table = parquet.read(columns=names, use_threads=False)
    return {name: _list(table.column(name)) for name in names}


def _list(column: Any) -> list[Any]:
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return list(column.to_pylist())
    stored = column.cast(pa.large_binary()).to_pylist()  # may hold what is not UTF-8
    return ["" if value is None else str(value, "utf-8", "replace") for value in stored]


def _stored(parquet: pq.ParquetFile, stem: str) -> list[_Stored]:
    """What each row says of one tensor, whose bytes are counted, hashed and let go."""
    num_rows = parquet.metadata.num_rows
    missing = _missing(parquet, stem)
    if missing:
        stored = _Stored(stem, missing=missing[0] if len(missing) == 1 else "")
        return [stored] * num_rows
    values = _values(parquet, (f"{stem}_shape", f"{stem}_dtype"))
    dtypes = values.get(f"{stem}_dtype", [""] * num_rows)
    batches = parquet.iter_batches(_ROWS_AT_ONCE, columns=[f"{stem}_bytes"], use_threads=False)
    found = (_measured(value) for batch in batches for value in batch[0])
    rows = zip(found, values[f"{stem}_shape"], dtypes, strict=True)
    return [
        _Stored(stem, size, tuple(shape or ()), dtype, sha256=sha256)
        for (size, sha256), shape, dtype in rows
    ]


def _measured(value: Any) -> tuple[int, str]:
    data = value.as_buffer() or b""
    return len(data), hashlib.sha256(data).hexdigest()


def _missing(parquet: pq.ParquetFile, stem: str) -> list[str]:
    needed = (f"{stem}_bytes", f"{stem}_shape")
    return [name for name in needed if name not in parquet.schema_arrow.names]


def _clip(place: tuple[str, int], values: dict[str, Any], stored: Sequence[_Stored]) -> StoredClip:
    tensors, fault = _checked(stored)
    latent, text = (tuple(length or 0 for length in tensor.shape) for tensor in stored[:2])
    width, height = values.get("width") or 0, values.get("height") or 0
    if len(latent) == TENSORS["vae_latent"] and (width - height) * (latent[3] - latent[2]) < 0:
        width, height = height, width
    return StoredClip(
        file=place[0],
        row=place[1],
        id=values["id"],
        caption=values["caption"],
        width=width,
        height=height,
        num_latent_frames=latent[1] if len(latent) == TENSORS["vae_latent"] else 0,
        fps=float(values.get("fps") or 0),
        duration_s=float(values.get("duration_sec") or 0),
        latent_shape=latent,
        text_shape=text,
        tensors=tensors,
        sha256=hashing.fingerprint([values["caption"], *([t.stem, t.sha256] for t in stored)]),
        fault=fault,
    )


def _checked(stored: Sequence[_Stored]) -> tuple[frozenset[str], tuple[str, str] | None]:
    """Stems of the sound tensors of a row, and the first fault."""
    sound: dict[str, _Stored] = {}
    faults = []
    for tensor in stored:
        try:
            if tensor.dtype() is not None:
                sound[tensor.stem] = tensor
        except _Damaged as damage:
            faults.append((damage.reason, damage.detail))
    latent, image = sound.get("vae_latent"), sound.get("first_frame_latent")
    if latent and image and latent.shape != image.shape:
        detail = f"first_frame_latent is {list(image.shape)}, vae_latent {list(latent.shape)}"
        faults.append(("unequal_latents", detail))
    return frozenset(sound), faults[0] if faults else None


def _single_rows(
    parquet: pq.ParquetFile, rows: Sequence[int], stems: Sequence[str]
) -> Iterator[tuple[int, Any]]:
    """Pairs of a wanted row's number and a batch of that row alone."""
    wanted = set(rows)
    names = [f"{stem}_{part}" for stem in stems for part in ("bytes", "shape", "dtype")]
    columns = [name for name in names if name in parquet.schema_arrow.names]
    first = 0
    for group in range(parquet.num_row_groups):
        end = first + parquet.metadata.row_group(group).num_rows
        left = len(wanted.intersection(range(first, end)))
        if left:
            batches = parquet.iter_batches(
                1, row_groups=[group], columns=columns, use_threads=False
            )
            singles = (batch[i : i + 1] for batch in batches for i in range(batch.num_rows))
            for row, batch in enumerate(singles, first):
                if row in wanted:
                    yield row, batch
                    left -= 1
                if not left:
                    break
        first = end


def _tensors(batch: Any, stems: Sequence[str]) -> dict[str, "Tensor"]:
    tensors = {}
    for stem in stems:
        data = batch.column(f"{stem}_bytes")[0].as_buffer() or b""
        shape = batch.column(f"{stem}_shape")[0].as_py() or ()
        name = f"{stem}_dtype"
        declared = _list(batch.column(name))[0] if name in batch.schema.names else ""
        stored = _Stored(stem, len(data), tuple(shape), declared)
        dtype = stored.dtype()
        if dtype is not None:
            tensors[stem] = _tensor(data, stored.checked_shape(), dtype)
    return tensors


def _tensor(data: Any, shape: tuple[int, ...], dtype: str) -> "Tensor":
    import torch

    stored = "int16" if dtype == "bfloat16" else dtype  # numpy has no bfloat16
    values = torch.from_numpy(np.frombuffer(data, stored).copy())
    return values.view(getattr(torch, dtype)).view(shape)


def _changed(path: Path, row: int, detail: str) -> UserError:
    return UserError(
        f"{path}: row {row}: {detail}; the file has changed since it was listed, run preprocess "
        "again"
    )
