# SPDX-License-Identifier: Apache-2.0
"""CSV and JSON that name files and captions, as the ``metadata.csv`` of a folder of videos does."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from fastvideo.data.entries import decoded, parse_entries
from fastvideo.data.hf.cells import TableRow, VideoCell
from fastvideo.data.hf.root import Root
from fastvideo.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class TextTable:
    """A CSV or JSON file; it is read whole."""

    def __init__(self, root: Root, file: str) -> None:
        """Name it; it is opened when it is read."""
        self.file = file
        self._root = root

    def columns(self) -> dict[str, None]:
        """Names of the keys of all rows; they have no types."""
        rows = (row for row in self._entries() if isinstance(row, dict))
        return dict.fromkeys(key for row in rows for key in row if isinstance(key, str))

    def rows(self, *, video: str, caption: str) -> Iterator[TableRow]:
        """Yield every row."""
        for index, entry in enumerate(self._entries()):
            values = entry if isinstance(entry, dict) else {}
            cell = values.get(video)
            path = cell.get("path") if isinstance(cell, dict) else cell
            yield TableRow(index, VideoCell(path, False), values.get(caption))

    def contents(self, video: str, rows: Sequence[int]) -> Iterator[bytes | None]:
        """Texts hold no videos."""
        yield from (None for _ in rows)

    def _entries(self) -> list[Any]:
        name = f"{self._root.address}/{self.file}"
        with self._root.open(self.file) as file:
            data = file.read()
        suffix = self.file[self.file.rindex(".") :].lower()
        if suffix in _DELIMITERS:
            return list(_csv_rows(data, name=name, delimiter=_DELIMITERS[suffix]))
        example = '{"file_name": "a.mp4", "caption": "what it shows"}, an object per line'
        return parse_entries(data, file=name, example=example, one=True)


def _csv_rows(data: bytes, *, name: str, delimiter: str) -> Iterator[dict[Any, Any]]:
    text = decoded(data, file=name, encoding="utf-8-sig")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = reader.fieldnames or ()
        _require_distinct(header, name=name)
        for row in reader:
            if None in row:
                raise UserError(
                    f"{name}: line {reader.line_num}: has more cells than the header has names, "
                    f"{len(header)}; put a text that holds {delimiter!r} in double quotes"
                )
            yield row
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"{name}: line {line}: is no valid CSV: {error}") from None


def _require_distinct(header: Sequence[str], *, name: str) -> None:
    repeated = next((key for key in header if key and header.count(key) > 1), None)
    if repeated is not None:
        raise UserError(f"{name}: line 1: two columns are called {repeated}; rename or remove one")
