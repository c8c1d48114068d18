# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: USR2, TERM, the first Ctrl-C, or a STOP file in the run directory."""

import contextlib
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Self

from fastvideo import atomic
from fastvideo.errors import STOP_SIGNALS, Stopped, UserError
from fastvideo.state import RunDir, TrainDir

STOP_FILE = "the STOP file"


def is_of_person(reason: str | None) -> bool:
    """Whether a person asked for a reason such as this, rather than a queue."""
    return reason in (STOP_FILE, signal.SIGINT.name)


class StopRequest:
    """Remembers that a stop was asked for; the loop looks between steps.

    As a context it gives the signals back at its end.
    """

    def __init__(self, run_dir: RunDir, *, asked: Path | None = None) -> None:
        """Watch ``run_dir``'s STOP file, the signals, and the file in which a parent asks."""
        self._file, self._asked = run_dir.stop, asked
        self._signal: signal.Signals | None = None
        self._honoured: str | None = None
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._receive) for number in STOP_SIGNALS
        }

    def __enter__(self) -> Self:
        """Nothing; it listens since it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends it at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._asked is not None and (asked := _text(self._asked)) is not None:
            return asked
        return STOP_FILE if self._file.exists() else self._honoured

    @property
    def signalled(self) -> str | None:
        """The name of the signal that asked, or None."""
        return None if self._signal is None else self._signal.name

    def honour(self) -> None:
        """Remember that this process stops, whatever becomes of the STOP file."""
        self._honoured = self.reason()

    def leave(self) -> None:
        """After training: take the STOP file away, so that the next start continues.

        Where another expert trains in the same run, the last one to stop takes it.
        """
        if self._honoured is None:
            return
        with contextlib.ExitStack() as locks, contextlib.suppress(UserError):
            for lock in self._file.parent.glob("train/*/lock"):
                locks.enter_context(atomic.alone(lock, busy="trains"))
            self._file.unlink(missing_ok=True)


def stopped(directory: TrainDir, reason: str, *, steps: int) -> Stopped:
    """The end of a training that nothing of is in progress: what is saved is all there is."""
    step = max(directory.complete_checkpoints(), default=0)
    return Stopped(
        f"stopped by {reason} after step {step} of {steps} of {directory.root.name}; the same "
        "command continues",
        by_person=is_of_person(reason),
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
