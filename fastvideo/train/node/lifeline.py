# SPDX-License-Identifier: Apache-2.0
"""Processes that never outlive the one that started them, not even one killed with SIGKILL."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastvideo import atomic
from fastvideo.errors import STOP_SIGNALS

PR_SET_PDEATHSIG = 1
LAST_BREATH_S = 10.0
"""How long killed processes may take to give their memory back."""


def start(module: str, arguments: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with its stdout on our stderr and its stderr in ``log``.

    Signals are held back until it decides what to do with them (``deaf``), so that none kills it
    while Python starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with open(log, "ab") as file:
            command = [sys.executable, "-m", module, *arguments]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=file)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(process: "subprocess.Popen[bytes]", *, known: Iterable[int]) -> None:
    """Kill a process and those it started, and wait until they are gone.

    Args:
        process: Started by ``start``.
        known: Process ids that it is known to have started; if it was killed by somebody else,
            they die with it and are waited for.
    """
    children: list[int] = []
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # so that it starts no more of them
        children = _children(process.pid)
        process.kill()
        process.wait()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    deadline_s = time.monotonic() + LAST_BREATH_S
    while any(map(atomic.running, {*children, *known})) and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(status.parent.name))
    return found


def deaf() -> None:
    """Ignore requests to stop, as do processes started from here until they install handlers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_with(parent: int) -> None:
    """Have the kernel kill this process with the process ``parent``; at once if that is gone."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def tied(parent: int, *, lock: Path) -> Iterator[None]:
    """Die with the process ``parent``, and keep ``lock`` from others until then.

    A start that takes over waits for the lock, so it never runs beside processes that are still
    on their way out.
    """
    die_with(parent)
    with atomic.together(lock, wait_s=LAST_BREATH_S) as held:
        if not held:
            print(f"{lock}: is held by another start for {LAST_BREATH_S:g} s", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        yield
