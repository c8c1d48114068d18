# SPDX-License-Identifier: Apache-2.0
"""The ways a verb ends early on purpose, and the exit codes others script against."""

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""Requests to stop: of a queue, and Ctrl-C."""
EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake in the input; the message names the file, key or value and the fix."""


class Stopped(BaseException):
    """A stop was asked for and the state is saved; the same command continues from there.

    A library in which a signal finds us must not take it for a fault of its own: no Exception.
    """

    def __init__(
        self, message: str, *, by_person: bool = False, progress: int | None = None
    ) -> None:
        """Say why.

        Args:
            message: For people.
            by_person: A person asked (a STOP file, Ctrl-C), who does not want it to go on by
                itself; a queue does.
            progress: A number that differs between two stops if work was done in between.
        """
        super().__init__(message)
        self.by_person, self.progress = by_person, progress


class Failed(Exception):
    """The machine, not the input, ended it: a full disk, a hang; the message says what to do."""


@contextlib.contextmanager
def measuring(progress: Callable[[], int]) -> Iterator[None]:
    """Have every stop in here tell how far the work is, unless it does already."""
    try:
        yield
    except Stopped as stopped:
        if stopped.progress is None:
            stopped.progress = progress()
        raise


def describe(error: Exception) -> str:
    """An exception that nobody expected, after what was noted of it."""
    notes = getattr(error, "__notes__", [])
    return ": ".join([*notes, f"{type(error).__name__}: {error}"])
