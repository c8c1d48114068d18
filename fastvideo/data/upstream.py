# SPDX-License-Identifier: Apache-2.0
"""Reads the Parquet of upstream FastVideo's preprocessing and says what is wrong in it.

Such files have many rows in one row group, compressed and dictionary encoded, so a row cannot be
read by itself: columns are streamed from their beginning. Nothing in them says which VAE or text
encoder made them. A row that cannot be used is described, not raised; a file that cannot is raised.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo import hashing
from fastvideo.data.upstream_tensor import EMPTY, TENSORS, Damaged, StoredTensor, measured, restored
from fastvideo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TRAINING_FOLDERS = ("combined_parquet_dataset", "training_dataset")
VALIDATION_FOLDERS = ("validation_dataset", "validation_parquet_dataset")
OUR_TABLES = ("manifest.parquet", "validation.parquet")
"""Of a folder of our own shards, which may be read like upstream's."""

_CORE_COLUMNS = (
    "id",
    "caption",
    *(f"{stem}_{part}" for stem in EMPTY for part in ("bytes", "shape")),
)
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
        fps: As stored, which is that of the video, not that of the frames taken; 0 if unknown.
        duration_s: As stored, 0 if unknown.
        shapes: Those of the sound tensors that the row has, by stem. Latent frames are counted
            here: the column ``num_frames`` holds latent or pixel frames, as its writer had it.
        sha256: Of caption and tensors; equal for rows with the same content.
        faults: Why a tensor cannot be used, by stem: in snake_case, and the value at fault.
    """

    file: str
    row: int
    id: str
    caption: str
    width: int
    height: int
    fps: float
    duration_s: float
    shapes: Mapping[str, tuple[int, ...]]
    sha256: str
    faults: Mapping[str, tuple[str, str]]


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
    every = hashing.files_below(searched)
    found = (path.relative_to(root) for path in every if path.suffix == ".parquet")
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
        _refuse_more_captions(path, parquet)
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
            except Damaged as damage:
                raise _changed(path, row, damage.detail) from None


def _refuse_more_captions(path: Path, parquet: pq.ParquetFile) -> None:
    """Our own shards may hold several captions of a clip, which would be lost here."""
    for captions in _values(parquet, ("more_captions",)).get("more_captions", ()):
        if captions:
            raise UserError(
                f"{path}: holds clips with more than one caption, which a parquet source does not "
                "take; these are shards of this suite: name their folder as shards.path"
            )


def _left_out(file: Path) -> bool:
    hidden_or_other = any(p.startswith(".") or p in VALIDATION_FOLDERS for p in file.parts)
    return hidden_or_other or file.name in OUR_TABLES


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
    if "pooled_text_embedding_bytes" in schema.names:
        raise UserError(
            f"{path}: is a shard of this suite, whose pooled text is apart from text_embedding; "
            "train on it as it is, with shards.path and the source it was made from"
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


def _stored(parquet: pq.ParquetFile, stem: str) -> list[StoredTensor]:
    """What each row says of one tensor, whose bytes are counted, hashed and let go."""
    num_rows = parquet.metadata.num_rows
    missing = _missing(parquet, stem)
    if missing:
        stored = StoredTensor(stem, missing=missing[0] if len(missing) == 1 else "")
        return [stored] * num_rows
    values = _values(parquet, (f"{stem}_shape", f"{stem}_dtype"))
    dtypes = values.get(f"{stem}_dtype", [""] * num_rows)
    batches = parquet.iter_batches(_ROWS_AT_ONCE, columns=[f"{stem}_bytes"], use_threads=False)
    found = (value for batch in batches for value in batch[0])
    rows = zip(found, values[f"{stem}_shape"], dtypes, strict=True)
    return [
        measured(stem, value.as_buffer() or b"", shape=shape, declared=declared)
        for value, shape, declared in rows
    ]


def _missing(parquet: pq.ParquetFile, stem: str) -> list[str]:
    needed = (f"{stem}_bytes", f"{stem}_shape")
    return [name for name in needed if name not in parquet.schema_arrow.names]


def _clip(
    place: tuple[str, int], values: dict[str, Any], stored: Sequence[StoredTensor]
) -> StoredClip:
    shapes, faults = _checked(stored)
    width, height = values.get("width") or 0, values.get("height") or 0
    if "vae_latent" in shapes:
        _, _, rows, columns = shapes["vae_latent"]
        if (width - height) * (columns - rows) < 0:
            width, height = height, width
    contents = [[t.stem, t.declared, t.shape, t.sha256] for t in stored]
    return StoredClip(
        file=place[0],
        row=place[1],
        id=values["id"],
        caption=values["caption"],
        width=width,
        height=height,
        fps=float(values.get("fps") or 0),
        duration_s=float(values.get("duration_sec") or 0),
        shapes=shapes,
        sha256=hashing.fingerprint([values["caption"], *contents]),
        faults=faults,
    )


def _checked(
    stored: Sequence[StoredTensor],
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, str]]]:
    """Shapes of the sound tensors of a row, and the faults of the others."""
    shapes: dict[str, tuple[int, ...]] = {}
    faults = {}
    for tensor in stored:
        try:
            if tensor.dtype() is not None:
                shapes[tensor.stem] = tensor.checked_shape()
        except Damaged as damage:
            faults[tensor.stem] = (damage.reason, damage.detail)
    latent, image = shapes.get("vae_latent"), shapes.get("first_frame_latent")
    if latent and image and latent != image:
        detail = f"first_frame_latent is {list(image)}, vae_latent {list(latent)}"
        faults["first_frame_latent"] = ("unequal_latents", detail)
        del shapes["first_frame_latent"]
    return shapes, faults


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
    found = {}
    for stem in stems:
        name = f"{stem}_dtype"
        found[stem] = restored(
            stem,
            batch.column(f"{stem}_bytes")[0].as_buffer() or b"",
            shape=batch.column(f"{stem}_shape")[0].as_py(),
            declared=_list(batch.column(name))[0] if name in batch.schema.names else "",
        )
    return {stem: tensor for stem, tensor in found.items() if tensor is not None}


def _changed(path: Path, row: int, detail: str) -> UserError:
    return UserError(
        f"{path}: row {row}: {detail}; the file has changed since it was listed, run preprocess "
        "again"
    )
