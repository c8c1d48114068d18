# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of clips are: in files of their own, or in the rows of a data set's files.

Kept free of torch and pyarrow: processes that decode import this module.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastvideo.errors import UserError

Stamp = tuple[int, int]
"""Size of a file in bytes and time of its last change in ns; on the Hub, a number that stands for
its content."""
Content = Path | bytes
"""What a decoder opens: a file on this machine, or the content of one."""

IO_TRIES = 3
"""How often a file is read before a failure of the disk or the network is believed."""


@dataclass(frozen=True)
class Origin:
    """Where the bytes of one clip are."""

    file: str
    """Relative to the folder of the source: the clip itself, or the data file that holds it."""
    row: int | None = None
    """Of that data file, from 0; None if the file is the clip."""

    def __str__(self) -> str:
        return self.file if self.row is None else f"{self.file}#{self.row}"


class Footage(Protocol):
    """The clips of a source, by origin."""

    def read(self, origins: Iterable[Origin]) -> Iterator[Content]:
        """Yield the content of each clip, in order and as it is asked for.

        Of neighbours with ascending rows the data file is read once.

        Raises:
            UserError: A data file or a row is gone since the manifest was planned.
            OSError: A data file could not be read; no clip is to blame.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """Clips that are files below a folder."""

    root: Path

    def read(self, origins: Iterable[Origin]) -> Iterator[Content]:
        """Yield the files; nothing is opened."""
        for origin in origins:
            assert origin.row is None
            yield self.root / origin.file


@dataclass(frozen=True)
class Planned:
    """The content of a clip, and what the manifest knows of it."""

    name: str
    """For people: file, or data file and row."""
    content: Content
    stamp: Stamp
    """Of a clip that is a file."""
    sha256: str
    """Of a clip that is a row."""

    def unchanged(self) -> Content:
        """Return the content.

        Raises:
            UserError: It is not what the manifest was planned from.
        """
        if isinstance(self.content, bytes):
            changed = hashlib.sha256(self.content).hexdigest() != self.sha256
        else:
            changed = stamp(self.content) != self.stamp
        if changed:
            raise UserError(
                f"{self.name}: changed since the manifest was planned; preprocess again"
            )
        return self.content


def stamp(file: Path) -> Stamp:
    """What tells that a file is still the same without reading it.

    Raises:
        UserError: It is gone since the manifest was planned.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        raise UserError(f"{file}: is gone since the manifest was planned") from None
    return status.st_size, status.st_mtime_ns
