# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes, by phase, without making the GPU wait."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Phase = Literal["data", "forward", "backward", "optimizer", "save", "heldout", "sampling"]

# The host's own work: the GPU may still compute what it was told before.
HOST_PHASES = ("data", "save", "sampling")
_SETTLE_ABOVE = 256


class Stopwatch:
    """Sums seconds per phase.

    On a GPU, phases that compute are timed there, by events on the current stream, and nothing
    waits for them before `take`; the other phases are timed on the host. As the two run side by
    side, the sum of phases may exceed the time that has passed.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """``clock`` gives seconds; ``device`` is ``cpu`` or ``cuda``."""
        self._device, self._clock = device, clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what happens inside as ``name``."""
        on_gpu = self._device == "cuda" and name not in HOST_PHASES
        with self._events(name) if on_gpu else self._clocked(name):
            yield

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last take; waits for the GPU."""
        if self._pending:
            torch.cuda.synchronize()
            self._settle()
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    @contextmanager
    def _clocked(self, name: str) -> Iterator[None]:
        start_s = self._clock()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - start_s

    @contextmanager
    def _events(self, name: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((name, start, end))
            if len(self._pending) > _SETTLE_ABOVE:
                self._settle()

    def _settle(self) -> None:
        """Count the events that the GPU has passed, without waiting for others."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self._seconds[name] += start.elapsed_time(end) / 1000
