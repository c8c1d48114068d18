# SPDX-License-Identifier: Apache-2.0
"""Processes of one gloo group, forked from the test, and the memory they take."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from tests.tiny_world import start_fork, wait_for


def run_together(count: int, action: Callable[[int], object], *, store: Path) -> None:
    """Run ``action(rank)`` in ``count`` processes that can talk, all of which must succeed."""

    def member(rank: int) -> Callable[[], object]:
        def run() -> None:
            meeting = dist.FileStore(str(store), count)
            dist.init_process_group("gloo", store=meeting, rank=rank, world_size=count)
            action(rank)
            dist.barrier()
            dist.destroy_process_group()

        return run

    children = [start_fork(member(rank), environment={}) for rank in range(count)]
    assert [wait_for(child) for child in children] == [0] * count


class Memory:
    """Peak of the resident memory of this process, over what it was at the start, in bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
        self._start = _status("VmRSS")

    def peak(self) -> int:
        """Of all moments since the start."""
        return _status("VmHWM") - self._start


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024
