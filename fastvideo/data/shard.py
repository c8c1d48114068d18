# SPDX-License-Identifier: Apache-2.0
"""The shard contract: Parquet schema, markers, atomic write and direct reads of one tensor.

Columns and their meaning follow upstream FastVideo's schemas, ours come after. One row group per
sample, not compressed, no dictionary, no statistics: each tensor lies in the file as one run of
bytes whose place the marker records, so that training reads it with one ``pread`` and needs no
footer.
"""

import os
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastvideo import __version__, atomic, hashing, state
from fastvideo.errors import UserError
from fastvideo.models.family import Text

_TENSOR = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}


def _tensor_columns(*names: str) -> list[pa.Field]:
    return [pa.field(f"{name}_{part}", kind) for name in names for part, kind in _TENSOR.items()]


_CLIP_COLUMNS = [
    pa.field("file_name", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("media_type", pa.string()),
    pa.field("width", pa.int64()),
    pa.field("height", pa.int64()),
    pa.field("num_frames", pa.int64()),
    pa.field("duration_sec", pa.float64()),
    pa.field("fps", pa.float64()),
]
_IMAGE_COLUMNS = _tensor_columns("clip_feature", "first_frame_latent", "pil_image")
_POOLED = "pooled_text_embedding"


def shard_schema(columns: Collection[str]) -> pa.Schema:
    """A clip per row, for models that train on the tensors ``columns``.

    Upstream's ``pyarrow_schema_t2v``, or with a first-frame latent its ``pyarrow_schema_i2v``, and
    ours after them: HunyuanVideo's pooled text, and the second and further captions of a clip with
    their embeddings one below the other. ``num_frames`` counts latent frames and sizes are pixels,
    as upstream has it; ``vae_latent`` (C, T, Y, X) is raw, ``first_frame_latent`` of that shape is
    normalised, ``text_embedding`` (L, D) holds the valid tokens only.
    """
    pooled = _POOLED in columns
    return pa.schema(
        [
            pa.field("id", pa.string()),
            *_tensor_columns("vae_latent", "text_embedding"),
            *(_IMAGE_COLUMNS if "first_frame_latent" in columns else ()),
            *_CLIP_COLUMNS,
            *(_tensor_columns(_POOLED) if pooled else ()),
            *_tensor_columns("more_text_embeddings"),
            *(_tensor_columns(f"more_{_POOLED}s") if pooled else ()),
            pa.field("more_text_lengths", pa.list_(pa.int64())),
            pa.field("more_captions", pa.list_(pa.string())),
        ]
    )


PROMPT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        *_tensor_columns("text_embedding"),
        pa.field("caption", pa.string()),
        *_tensor_columns(_POOLED),
        *_IMAGE_COLUMNS,
        pa.field("num_frames", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("width", pa.int64()),
    ]
)
"""A prompt per row: upstream's text-only schema, then what ours adds. ``pil_image`` (3, H, W) is
the first image in RGB; ``num_frames`` here counts pixel frames of the video to sample."""


@dataclass(frozen=True)
class Row:
    """A sample to write: tensors by column stem, the rest by column."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Contents:
    """What a Parquet file is made from, for its marker."""

    fingerprint: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a Parquet file."""

    path: Path
    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    crc32: int

    def read(self) -> Tensor:
        """Read it; a ``UserError`` if the file was cut or changed since it was written."""
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.bytes, self.offset)
        if len(data) != self.bytes or zlib.crc32(data) != self.crc32:
            raise UserError(
                f"{self.path}: bytes {self.offset}..{self.offset + self.bytes} are damaged; remove "
                "the file and run preprocess again"
            )
        return _tensor(data, self.shape, self.dtype)


def write_shard(
    path: Path,
    rows: Iterable[Row],
    *,
    schema: pa.Schema,
    contents: Contents,
    failed: Sequence[Mapping[str, str]] = (),
    point: str,
) -> None:
    """Write a Parquet file and then its marker, each complete or not there at all.

    Args:
        path: The Parquet file.
        rows: Taken one by one.
        schema: Of the columns.
        contents: What the rows are made from.
        failed: Id, reason and detail of clips that gave no row; read after ``rows`` is used up.
        point: Names the fault points.
    """
    metadata = {
        "fastvideo.schema": str(state.SCHEMA_VERSION),
        "fastvideo.fingerprint": contents.fingerprint,
        "fastvideo.settings": hashing.canonical(contents.settings),
    }
    listed = []
    marker_path = state.marker_path(path)
    with atomic.replacing(path, point=f"{point}.parquet", marker=marker_path) as temporary:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
        ) as writer:
            for row in rows:
                writer.write_table(_table(row, schema))
                listed.append((row.values, list(row.tensors)))
            writer.add_key_value_metadata(metadata)
        places = _places(temporary, listed)
        size = temporary.stat().st_size
    marker = {
        "schema": state.SCHEMA_VERSION,
        "fingerprint": contents.fingerprint,
        "settings": contents.settings,
        "bytes": size,
        "rows": places,
        "failed": list(failed),
        "written_by": {
            "fastvideo": __version__,
            "torch": torch.__version__,
            "pyarrow": pa.__version__,
        },
    }
    atomic.write_json(marker_path, marker, point=f"{point}.marker")


def stored_tensor(path: Path, row: Mapping[str, Any], name: str) -> StoredTensor | None:
    """Return the place of tensor ``name`` in a marker's row, None if the row has none."""
    place = row["tensors"].get(name)
    if place is None:
        return None
    shape = tuple(place["shape"])
    return StoredTensor(
        path, place["offset"], place["bytes"], shape, place["dtype"], place["crc32"]
    )


def text_tensors(texts: Sequence[Text]) -> dict[str, Tensor]:
    """The tensors by column of a clip's captions, of which there is one at least."""
    first, *more = texts
    tensors = {"text_embedding": first.embedding}
    if more:
        tensors["more_text_embeddings"] = torch.cat([text.embedding for text in more])
    if first.pooled is not None:
        tensors[_POOLED] = first.pooled
        if more:
            pooled = [text.pooled for text in more if text.pooled is not None]
            tensors[f"more_{_POOLED}s"] = torch.stack(pooled)
    return tensors


def read_texts(path: Path, row: Mapping[str, Any]) -> tuple[Text, ...]:
    """The captions of a marker's row, as `text_tensors` took them apart."""
    found = {name: _read(path, row, name) for name in row["tensors"] if "text" in name}
    embeddings = [found["text_embedding"]]
    pooled: list[Tensor | None] = [found.get(_POOLED)]
    if "more_text_embeddings" in found:
        embeddings += found["more_text_embeddings"].split(row["more_text_lengths"])
        pooled += found.get(f"more_{_POOLED}s", [None] * len(row["more_text_lengths"]))
    return tuple(Text(*parts) for parts in zip(embeddings, pooled, strict=True))


def _read(path: Path, row: Mapping[str, Any], name: str) -> Tensor:
    stored = stored_tensor(path, row, name)
    assert stored is not None
    return stored.read()


def read_empty_prompt(store: state.ShardStore, *, settings: Mapping[str, Any]) -> Text:
    """The encoded empty prompt of ``validation.parquet``.

    ``settings`` are those of the shards; prompts encoded otherwise are refused.
    """
    marker = state.read_marker(store.validation)
    if marker is None or marker["settings"] != settings:
        raise UserError(f"{store.validation}: is missing or out of date; run preprocess")
    row = next(row for row in marker["rows"] if row["caption"] == "")
    return read_texts(store.validation, row)[0]


def cast(tensor: Tensor, dtype: str, *, clip: str) -> Tensor:
    """Return ``tensor`` in the stored ``dtype``; a value that does not fit is an error."""
    stored = tensor.to(getattr(torch, dtype))
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"clip {clip!r}: an encoder made values that are not finite; set shards.vae_dtype: "
            "float32, or filter the clip out"
        )
    if not bool(torch.isfinite(stored).all()):
        largest = float(tensor.abs().max())
        raise UserError(
            f"clip {clip!r}: its tensors reach {largest:g}, which {dtype} cannot hold; set "
            "shards.dtype: float32"
        )
    return stored


def _table(row: Row, schema: pa.Schema) -> pa.Table:
    values: dict[str, Any] = dict(row.values)
    for name, tensor in row.tensors.items():
        values[f"{name}_bytes"] = _bytes(tensor)
        values[f"{name}_shape"] = list(tensor.shape)
        values[f"{name}_dtype"] = str(tensor.dtype).removeprefix("torch.")
    columns = {}
    for column in schema:
        value = values[column.name] if column.name in values else _empty(column)
        columns[column.name] = pa.array([value], column.type)
    return pa.table(columns)


def _empty(column: pa.Field) -> Any:
    """What upstream writes, instead of null, for a tensor or a list that a row does not have."""
    if pa.types.is_list(column.type):
        return []
    assert not pa.types.is_primitive(column.type), f"a row lacks {column.name}"
    return b"" if pa.types.is_binary(column.type) else ""


def _places(path: Path, listed: list[tuple[Mapping[str, Any], list[str]]]) -> list[dict[str, Any]]:
    """Find each tensor's bytes: the tail of its column chunk, whose last part is the value."""
    with pq.ParquetFile(path) as parquet, open(path, "rb") as file:
        columns = {
            parquet.schema.column(i).path.split(".")[0]: i for i in range(len(parquet.schema))
        }
        places = []
        for group, (values, names) in enumerate(listed):
            row = parquet.read_row_group(group).to_pylist()[0]
            tensors = {}
            for name in names:
                data = row[f"{name}_bytes"]
                chunk = parquet.metadata.row_group(group).column(columns[f"{name}_bytes"])
                end = chunk.data_page_offset + chunk.total_compressed_size
                offset = end - len(data)
                file.seek(offset)
                assert file.read(len(data)) == data, "a tensor is not where the format puts it"
                tensors[name] = {
                    "offset": offset,
                    "bytes": len(data),
                    "shape": row[f"{name}_shape"],
                    "dtype": row[f"{name}_dtype"],
                    "crc32": zlib.crc32(data),
                }
            kept = ("id", "caption", "more_text_lengths")
            places.append({**{k: values[k] for k in kept if k in values}, "tensors": tensors})
        return places


def _bytes(tensor: Tensor) -> bytes:
    contiguous = tensor.detach().cpu().contiguous()
    if contiguous.dtype == torch.bfloat16:
        contiguous = contiguous.view(torch.int16)  # numpy has no bfloat16
    return contiguous.numpy().tobytes()


def _tensor(data: bytes, shape: tuple[int, ...], dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    if kind == torch.bfloat16:
        return torch.from_numpy(np.frombuffer(data, np.int16).copy()).view(kind).view(shape)
    return torch.from_numpy(np.frombuffer(data, np.dtype(dtype)).copy()).view(shape)
