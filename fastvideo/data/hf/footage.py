# SPDX-License-Identifier: Apache-2.0
"""The clips of a Hugging Face data set: files, or rows of data files, read in one go each."""

import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastvideo.config.source import HfSource
from fastvideo.data.footage import IO_TRIES, Content, Origin
from fastvideo.data.hf.arrow_table import ArrowTable
from fastvideo.data.hf.cells import TableRow
from fastvideo.data.hf.columns import Types, choose_columns
from fastvideo.data.hf.parquet_table import ParquetTable
from fastvideo.data.hf.root import Root, find_root
from fastvideo.data.hf.tar_table import TarTable
from fastvideo.data.hf.text_table import TextTable
from fastvideo.errors import UserError


class Table(Protocol):
    """A data file."""

    file: str

    def columns(self) -> Types:
        """Types by name."""
        ...

    def rows(self, *, video: str, caption: str) -> Iterator[TableRow]:
        """Yield every row without its video."""
        ...

    def contents(self, video: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the videos of ascending ``rows``; None where a row has none, or is gone."""
        ...


TABLES: dict[str, Callable[[Root, str], Table]] = {
    **dict.fromkeys((".parquet", ".geoparquet", ".gpq"), ParquetTable),
    **dict.fromkeys((".arrow",), ArrowTable),
    **dict.fromkeys((".tar",), TarTable),
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl", ".ndjson"), TextTable),
}
"""What reads a data file, by its suffix."""


def open_table(root: Root, file: str) -> Table:
    """A data file by the form that its name says.

    Raises:
        UserError: It is of a form that is not read.
    """
    suffix = posixpath.splitext(file)[1].lower()
    if suffix not in TABLES:
        raise UserError(
            f"{root.address}/{file}: is of a form that is not read; convert the data set to one of "
            f"{', '.join(TABLES)}"
        )
    return TABLES[suffix](root, file)


def dataset_footage(source: HfSource) -> "DatasetFootage":
    """The clips of a data set that was listed before.

    Raises:
        UserError: It is gone.
    """
    return DatasetFootage(source, find_root(source))


@dataclass(frozen=True)
class DatasetFootage:
    """Clips by origin."""

    source: HfSource
    root: Root

    def read(self, origins: Iterable[Origin]) -> Iterator[Content]:
        """Yield the content of each clip; see `Footage.read`."""
        for file, rows in _runs(origins):
            yield from self._read_run(file, rows)

    def _read_run(self, file: str, rows: Sequence[int | None]) -> Iterator[Content]:
        """The clips of a file; if it cannot be read, it is tried again where it broke off."""
        done, failures = 0, 0
        while done < len(rows):
            try:
                for content in self._contents(file, rows[done:]):
                    yield content
                    done += 1
            except FileNotFoundError:
                name = f"{self.root.address}/{file}"
                raise UserError(f"{name}: is gone since the manifest was planned") from None
            except OSError:
                failures += 1
                if failures == IO_TRIES:
                    raise
                time.sleep(failures)

    def _contents(self, file: str, rows: Sequence[int | None]) -> Iterator[Content]:
        stored = [row for row in rows if row is not None]
        if stored:
            yield from self._stored(file, stored)
        else:
            yield self.root.content(file)

    def _stored(self, file: str, rows: Sequence[int]) -> Iterator[bytes]:
        table = open_table(self.root, file)
        name = f"{self.root.address}/{file}"
        chosen = choose_columns(self.source, table.columns(), file=name, is_folder=False)
        for row, content in zip(rows, table.contents(chosen.video, rows), strict=True):
            if content is None:
                raise UserError(f"{name}: row {row} is gone since the manifest was planned")
            yield content


def _runs(origins: Iterable[Origin]) -> Iterator[tuple[str, Sequence[int | None]]]:
    """Files by themselves, with None for a row, and neighbouring rows of one that ascend."""
    file, rows = "", list[int]()
    for origin in origins:
        if rows and (origin.row is None or origin.file != file or origin.row <= rows[-1]):
            yield file, rows
            rows = []
        if origin.row is None:
            yield origin.file, [None]
        else:
            file = origin.file
            rows.append(origin.row)
    if rows:
        yield file, rows
