# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: USR2, TERM, the first Ctrl-C, or a STOP file in the run directory."""

import contextlib
import signal
from types import FrameType

from fastvideo import atomic
from fastvideo.errors import UserError
from fastvideo.state import RunDir

SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers that a stop was asked for; the loop looks between steps."""

    def __init__(self, run_dir: RunDir) -> None:
        """Watch ``run_dir``'s STOP file and the signals."""
        self._file = run_dir.stop
        self._signal: signal.Signals | None = None
        self._honoured: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends it at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        return "the STOP file" if self._file.exists() else self._honoured

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
