# SPDX-License-Identifier: Apache-2.0
"""Parquet with videos in its rows: listed without reading them, then read row by row.

A row group may be larger than memory: rows are streamed from its beginning, and only row groups
with wanted rows are touched. What is held is a page; some writers put many clips into one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo.data.hf.cells import (
    TableRow,
    VideoCell,
    embedded_bytes,
    is_bytes,
    reading,
    texts,
    video_cells,
)
from fastvideo.data.hf.root import Root

_ROWS_AT_ONCE = 256
_BUFFER_BYTES = 1 << 20


class ParquetTable:
    """A Parquet file."""

    def __init__(self, root: Root, file: str) -> None:
        """Name it; it is opened when it is read."""
        self.file = file
        self._root = root

    def columns(self) -> dict[str, pa.DataType]:
        """Types by name."""
        with self._opened(sparse=True) as parquet:
            schema = parquet.schema_arrow
            return dict(zip(schema.names, schema.types, strict=True))

    def rows(self, *, video: str, caption: str) -> Iterator[TableRow]:
        """Yield every row. Videos are read only where the file does not count those it lacks."""
        index = 0
        with self._opened(sparse=True) as parquet:
            for group in range(parquet.num_row_groups):
                embedded = _all_embedded(parquet, group, video)
                leaves = _leaves(parquet.schema_arrow.field(video), with_bytes=embedded is None)
                at_once = 1 if embedded is None else _ROWS_AT_ONCE
                for batch in _batches(parquet, group, [*leaves, caption], at_once):
                    cells = _cells(batch, video, embedded)
                    captions = texts(batch.column(caption))
                    for cell, text in zip(cells, captions, strict=True):
                        yield TableRow(index, cell, text)
                        index += 1

    def contents(self, video: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the videos of ascending ``rows``; None where a row has none, or is gone."""
        wanted = iter(rows)
        row, first = next(wanted, None), 0
        with self._opened() as parquet:
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                if row is None:
                    return
                if row < end:
                    leaves = _leaves(parquet.schema_arrow.field(video), with_bytes=True)
                    for index, batch in enumerate(_batches(parquet, group, leaves, 1), first):
                        if index == row:
                            yield embedded_bytes(batch.column(video), 0)
                            row = next(wanted, None)
                        if row is None or row >= end:
                            break
                first = end
        while row is not None:
            yield None
            row = next(wanted, None)

    @contextlib.contextmanager
    def _opened(self, *, sparse: bool = False) -> Iterator[Any]:
        with (
            reading(f"{self._root.address}/{self.file}", form="Parquet"),
            self._root.open(self.file, sparse=sparse) as file,
            pq.ParquetFile(file, buffer_size=_BUFFER_BYTES) as parquet,
        ):
            yield parquet


def _batches(parquet: Any, group: int, columns: list[str], rows: int) -> Iterator[Any]:
    return iter(parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False))


def _leaves(field: pa.Field, *, with_bytes: bool) -> list[str]:
    """Parts of a column to read, as Parquet names them."""
    bytes_leaf = _bytes_leaf(field)
    if pa.types.is_struct(field.type):
        paths = [f"{field.name}.path"] if field.type.get_field_index("path") >= 0 else []
    else:
        paths = [] if bytes_leaf else [field.name]
    return [*paths, *([bytes_leaf] if bytes_leaf and with_bytes else [])]


def _bytes_leaf(field: pa.Field) -> str | None:
    if is_bytes(field.type):
        return str(field.name)
    is_struct = pa.types.is_struct(field.type)
    return f"{field.name}.bytes" if is_struct and field.type.get_field_index("bytes") >= 0 else None


def _cells(batch: Any, video: str, embedded: bool | None) -> list[VideoCell]:
    if video not in batch.schema.names:
        return [VideoCell(None, bool(embedded))] * batch.num_rows
    cells = video_cells(batch.column(video))
    return cells if embedded is None else [VideoCell(cell.path, embedded) for cell in cells]


def _all_embedded(parquet: Any, group: int, video: str) -> bool | None:
    """Whether all or none of a row group's rows hold a video; None if only reading can tell."""
    leaf = _bytes_leaf(parquet.schema_arrow.field(video))
    if leaf is None:
        return False
    metadata = parquet.metadata.row_group(group)
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == leaf)
    if statistics is None or not statistics.has_null_count:
        return None
    return {metadata.num_rows: False, 0: True}.get(statistics.null_count)
