# SPDX-License-Identifier: Apache-2.0
"""Processes that never outlive the one that started them, not even one killed with SIGKILL."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastvideo import atomic

PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""Requests to stop."""


def start(module: str, arguments: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with its stdout on our stderr and its stderr in ``log``.

    Signals are held back until it decides what to do with them (``deaf``), so that none kills it
    while Python starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with open(log, "ab") as file:
            command = [sys.executable, "-m", module, *arguments]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=file)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def deaf() -> None:
    """Ignore requests to stop, as do processes started from here until they install handlers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def tied(parent: int, *, lock: Path) -> Iterator[None]:
    """Die with the process ``parent``, and keep ``lock`` from others until then.

    A start that takes over waits for the lock, so it never runs beside processes that are still
    on their way out.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    with atomic.together(lock, wait_s=10) as held:
        # In this order: whoever gets here late finds that its parent is gone.
        if not held or os.getppid() != parent:
            os._exit(1)
        yield
