# SPDX-License-Identifier: Apache-2.0
"""The ways a verb ends early on purpose, and the exit codes others script against."""

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake in the input; the message names the file, key or value and the fix."""


class Stopped(Exception):
    """A stop was asked for and the state is saved; the same command continues from there."""


class Failed(Exception):
    """The machine, not the input, ended it: a full disk, a hang; the message says what to do."""
