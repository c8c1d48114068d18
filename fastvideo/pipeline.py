# SPDX-License-Identifier: Apache-2.0
"""All verbs of a recipe in order, each in a process of its own, killed and rerun at will."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Self

from fastvideo import atomic
from fastvideo.config.recipe import Recipe
from fastvideo.errors import EXIT_DONE, EXIT_STOPPED, STOP_SIGNALS, Stopped
from fastvideo.log import logger
from fastvideo.state import RunDir
from fastvideo.train.node import lifeline

VERBS = ("preprocess", "train", "export", "generate")


def run(recipe: Recipe, *, force: bool = False) -> int:
    """Run the verbs until one does not end with 0; what is complete is skipped by the verbs.

    They share a copy of the resolved recipe, so that editing the file changes no run under way.

    Returns:
        Exit code of the last verb that ran.

    Raises:
        Stopped: A stop was asked for.
    """
    resolved = RunDir(recipe.run_dir).resolved(recipe.train.expert)
    atomic.write_bytes(resolved, recipe.dump().encode(), point="run")
    with _Stops() as stops:
        for verb in VERBS:
            logger.info("run: %s", verb)
            flags = ["--force"] if force and verb == "train" else []
            code = stops.run([sys.executable, "-m", "fastvideo", verb, str(resolved), *flags])
            if stops.received is not None or code == EXIT_STOPPED:
                # A queue sends signals, a person also leaves a STOP file, which only verbs see.
                by_person = stops.received in (None, signal.SIGINT)
                raise Stopped(f"{verb}: stopped; the same command continues", by_person=by_person)
            if code != EXIT_DONE:
                logger.info("run: %s: exit code %d; the same command continues", verb, code)
                return code
    return EXIT_DONE


class _Stops:
    """Passes requests to stop on to the child of the moment, and remembers that there was one."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Run a child, its output on our stderr: stdout is for results; it dies with us."""
        if self.received is not None:  # between two children
            return EXIT_STOPPED
        dying = functools.partial(lifeline.die_with, os.getpid())
        self._child = subprocess.Popen(command, stdout=sys.stderr, preexec_fn=dying)
        if self.received is not None:  # while it was started
            self._pass_on(self.received)
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        # Ctrl-C reaches the child by itself, as part of the terminal's group.
        if number != signal.SIGINT and self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
