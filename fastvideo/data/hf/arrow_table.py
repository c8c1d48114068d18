# SPDX-License-Identifier: Apache-2.0
"""Arrow files, as ``save_to_disk`` writes them, mapped into memory: only what is used is read."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fastvideo.data.hf.cells import TableRow, embedded_bytes, reading, texts, video_cells
from fastvideo.data.hf.root import LocalRoot, Root

_END = b"\xff\xff\xff\xff\0\0\0\0"
"""What ends a stream: a message of no length."""


class ArrowTable:
    """An Arrow file, of either of its two forms."""

    def __init__(self, root: Root, file: str) -> None:
        """Name it; it is opened when it is read."""
        self.file = file
        self._root = root

    def columns(self) -> dict[str, pa.DataType]:
        """Types by name."""
        with self._opened() as (schema, _):
            return dict(zip(schema.names, schema.types, strict=True))

    def rows(self, *, video: str, caption: str) -> Iterator[TableRow]:
        """Yield every row."""
        index = 0
        with self._opened() as (_, batches):
            for batch in batches:
                cells, captions = video_cells(batch.column(video)), texts(batch.column(caption))
                for cell, text in zip(cells, captions, strict=True):
                    yield TableRow(index, cell, text)
                    index += 1

    def contents(self, video: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the videos of ascending ``rows``; None where a row has none, or is gone."""
        wanted = iter(rows)
        row, first = next(wanted, None), 0
        with self._opened() as (_, batches):
            for batch in batches:
                while row is not None and row < first + batch.num_rows:
                    yield embedded_bytes(batch.column(video), row - first)
                    row = next(wanted, None)
                if row is None:
                    return
                first += batch.num_rows
        while row is not None:
            yield None
            row = next(wanted, None)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[pa.Schema, Iterator[Any]]]:
        with reading(f"{self._root.address}/{self.file}", form="Arrow"), self._source() as source:
            try:
                stream = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                source.seek(0)
                file = pa.ipc.open_file(source)
                yield file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
                return
            yield stream.schema, _batches(stream, source)

    def _source(self) -> Any:
        if isinstance(self._root, LocalRoot):
            return pa.memory_map(str(self._root.folder / self.file))
        return pa.PythonFile(self._root.open(self.file))


def _batches(stream: Any, source: Any) -> Iterator[Any]:
    """All batches; Arrow takes a file that was cut between two of them for a whole one."""
    after = source.tell()
    for batch in stream:
        yield batch
        after = source.tell()
    source.seek(after)
    if source.read(len(_END)) != _END:
        raise pa.ArrowInvalid("it has no end of stream")
