# SPDX-License-Identifier: Apache-2.0
"""Signs of life of the processes that train, and how the one that hangs is found."""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fastvideo.errors import EXIT_UNEXPECTED
from fastvideo.log import logger

SIZE, WORDS = 128, 16384
"""Bytes of the beat of one process, and of its last words, which follow."""
START, ENDED = "start", "ended"
"""The phases before a process trains and after all is done."""
HELDOUT, SAVE, OPEN, SAMPLING = "heldout", "save", "open", "sampling"
"""Phases of the loop that are not part of a step; models to sample with are opened."""
START_MINUTES = 10.0
SAVE_FACTOR = 4
"""Files of many GB may be on a slow file system: a save, or opening models, which beat once, get so
many times the patience."""


@dataclass(frozen=True)
class Beat:
    """What a process said last."""

    rank: int
    pid: int
    step: int
    phase: str
    since_s: float
    """On the clock that all processes of the node share."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"in {self.phase!r} of step {self.step}"


class Pulse:
    """Writes the beats of one process where the node's parent reads them, in some microseconds."""

    def __init__(self, path: str, *, rank: int, local_rank: int) -> None:
        """``path`` as the parent's ``Pulses`` say it."""
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._offset, self._about = local_rank * (SIZE + WORDS), f"{rank} {os.getpid()}"
        self.step = 0

    def beat(self, step: int, phase: str) -> None:
        """Say that ``phase`` of ``step`` begins."""
        self.step = step
        record = f"{self._about} {step} {phase} {time.monotonic():.6f}\n"
        os.pwrite(self._file, record.encode().ljust(SIZE)[:SIZE], self._offset)

    def tell(self, words: str) -> None:
        """Leave last words, which reach the parent even where the disk is full."""
        os.pwrite(self._file, words.encode()[:WORDS], self._offset + SIZE)


class Pulses:
    """The beats of the processes of a node, in memory that ends with the parent."""

    def __init__(self, processes: int) -> None:
        """Room for so many processes."""
        self._file = os.memfd_create("fastvideo-pulses", os.MFD_CLOEXEC)
        os.truncate(self._file, processes * (SIZE + WORDS))

    def __enter__(self) -> Self:
        """Nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free it."""
        os.close(self._file)

    @property
    def path(self) -> str:
        """Where processes of the same user open it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def read(self) -> dict[int, Beat]:
        """The last beat of each process that said something, by rank."""
        return read_beats(self.path)

    def words(self) -> list[str]:
        """The last words of the processes that had some."""
        slots = _slots(self.path)
        return [slot[SIZE:].rstrip(b"\0").decode(errors="replace") for slot in slots if slot[SIZE]]


def _slots(path: str) -> list[bytes]:
    """What each process wrote."""
    size, content = SIZE + WORDS, Path(path).read_bytes()
    return [content[start : start + size] for start in range(0, len(content), size)]


def read_beats(path: str) -> dict[int, Beat]:
    """The beats at ``Pulses.path``, by rank."""
    found = {}
    for slot in _slots(path):
        fields = slot[:SIZE].rstrip(b"\0 \n").decode().split(" ")
        if len(fields) == 5:
            rank, pid, step, phase, since_s = fields
            found[int(rank)] = Beat(int(rank), int(pid), int(step), phase, float(since_s))
    return found


class Standstill:
    """How long things have not changed.

    Time in which nobody looked, say while the job was suspended, does not count.
    """

    def __init__(self, *, every_s: float) -> None:
        """Somebody looks about every ``every_s``."""
        self._longest_s = every_s + 1
        self._last: dict[int, object] = {}
        self._still_s: dict[int, float] = {}
        self._looked_s = time.monotonic()

    def look(self, now: Mapping[int, object]) -> float:
        """Compare with the last look; the longest standstill of any."""
        now_s = time.monotonic()
        passed_s = min(now_s - self._looked_s, self._longest_s)
        self._looked_s = now_s
        self._still_s = {
            key: self._still_s.get(key, 0.0) + passed_s if self._last.get(key) == value else 0.0
            for key, value in now.items()
        }
        self._last = dict(now)
        return max(self._still_s.values(), default=0.0)


class Patience:
    """How long processes may be without a beat before they hang.

    A start, which imports, loads, and compiles in its first step, gets some more; so do a save and
    the opening of models.
    """

    def __init__(self, hang_minutes: float) -> None:
        """What a step in full run gets."""
        self._minutes = hang_minutes
        self._first: dict[int, int] = {}

    def minutes(self, beats: Mapping[int, Beat]) -> float:
        """What processes with these beats get; it remembers the first step of each."""
        starting = [self._is_starting(beat) for beat in beats.values()]
        with_files = any(beat.phase in (SAVE, OPEN) for beat in beats.values())
        least = START_MINUTES if any(starting) or not beats else 0.0
        return max(self._minutes * (SAVE_FACTOR if with_files else 1), least)

    def _is_starting(self, beat: Beat) -> bool:
        if beat.phase not in (START, HELDOUT, OPEN, SAMPLING):
            self._first.setdefault(beat.rank, beat.step)
        return beat.step <= self._first.get(beat.rank, beat.step)


def describe_hang(beats: Mapping[int, Beat], *, minutes: float) -> str:
    """Name the processes that hold up the others.

    A process that is stopped by a signal is one. Else those that are furthest behind are: in the
    lowest step, and there in the phase that was entered first.
    """
    held = sorted(beats.values(), key=lambda beat: (beat.step, beat.since_s))
    behind = [beat for beat in held if _is_stopped(beat.pid)] or [
        beat for beat in held if (beat.step, beat.phase) == (held[0].step, held[0].phase)
    ]
    others: dict[str, list[int]] = {}
    for beat in held:
        if beat not in behind:
            others.setdefault(beat.where, []).append(beat.rank)
    names = " and ".join(
        f"rank {beat.rank} (process {beat.pid} on {socket.gethostname()})"
        for beat in sorted(behind, key=lambda beat: beat.rank)
    )
    waiting = "".join(
        f"; {_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {where}"
        for where, ranks in others.items()
    )
    verb = "hangs" if len(behind) == 1 else "hang"
    return f"{names} {verb} {behind[0].where} for {minutes:g} min{waiting}"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _is_stopped(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"


class Watched:
    """The pulse of a process without a parent: a thread ends it when it hangs."""

    def __init__(self, *, hang_minutes: float) -> None:
        """Watch while the context is open."""
        self._patience = Patience(hang_minutes)
        self._every_s = min(1.0, hang_minutes * 60 / 4)
        self.beat(0, START)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """No longer watch."""
        self._over.set()
        self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Say that ``phase`` of ``step`` begins."""
        self._beat = Beat(0, os.getpid(), step, phase, time.monotonic())

    def _watch(self) -> None:
        still = Standstill(every_s=self._every_s)
        last, changes = self._beat, 0
        while not self._over.wait(self._every_s):
            if self._beat is not last:
                last, changes = self._beat, changes + 1
            minutes = self._patience.minutes({0: last})
            if still.look({0: changes}) > minutes * 60:
                logger.error("hangs in %r of step %d for %g min", last.phase, last.step, minutes)
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(EXIT_UNEXPECTED)
