# SPDX-License-Identifier: Apache-2.0
"""All verbs of a recipe in order, each in a process of its own, killed and rerun at will."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fastvideo.errors import EXIT_DONE
from fastvideo.log import logger

VERBS = ("preprocess", "train", "export", "generate")


def run(recipe: Path, overrides: Sequence[str], *, force: bool = False) -> int:
    """Run the verbs until one does not end with 0; what is complete is skipped by the verbs.

    Returns:
        Exit code of the last verb that ran.
    """
    for verb in VERBS:
        logger.info("run: %s", verb)
        flags = ["--force"] if force and verb == "train" else []
        command = [sys.executable, "-m", "fastvideo", verb, str(recipe), *overrides, *flags]
        code = _run(command)
        if code != EXIT_DONE:
            logger.info("run: %s ended with exit code %d; the same command continues", verb, code)
            return code
    return EXIT_DONE


def _run(command: Sequence[str]) -> int:
    """Run a child, results on our stderr's side of stdout, and pass requests to stop on to it."""
    child = subprocess.Popen(command, stdout=sys.stderr)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    # Ctrl-C reaches the child by itself, as part of the terminal's group.
    previous = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR2)}
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGINT, interrupt)
    return code if code >= 0 else 128 - code
