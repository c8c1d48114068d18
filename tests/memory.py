# SPDX-License-Identifier: Apache-2.0
"""The memory that a process takes."""

import ctypes
import gc
from pathlib import Path


class Memory:
    """The most resident memory of this process, over what it was at the start."""

    def __init__(self) -> None:
        # Give back what is free, or what is taken next would not be seen.
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the most so far becomes the present
        self._start = _bytes("VmRSS")

    def peak(self) -> int:
        """Of all moments since the start, in bytes."""
        return _bytes("VmHWM") - self._start


def _bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
