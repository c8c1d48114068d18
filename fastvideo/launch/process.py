# SPDX-License-Identifier: Apache-2.0
"""A process by a name that no later process gets, so that a file can say who does something."""

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from fastvideo import atomic

BOOT = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Process:
    """A process of some host: its number alone comes back after a restart of the host."""

    host: str
    boot: str
    """Which start of the host."""
    namespace: str
    """In which container its number counts."""
    pid: int
    started: int
    """Clock ticks from the host's start to its own."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """A process that runs here."""
        return cls(socket.gethostname(), _boot(), _namespace(), pid, _started(pid) or 0)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """One that ``write`` has named; None if none is."""
        value = atomic.read_json(path)
        return None if value is None else cls(**value)

    def write(self, path: Path) -> None:
        """Name it in a file."""
        atomic.write_json(path, asdict(self), point="process")

    def runs(self) -> bool | None:
        """Whether it still runs; None if that cannot be told from here."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot():
            return False
        if self.namespace != _namespace():
            return None
        return atomic.running(self.pid) and _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # from the third field on, see proc(5)


def _boot() -> str:
    return BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""


def _namespace() -> str:
    return os.readlink(NAMESPACE) if NAMESPACE.is_symlink() else ""
