# SPDX-License-Identifier: Apache-2.0
"""Processes that compute together, forked from the test so that torch is imported once."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny_world import start_fork, wait_for_all


def in_ranks(count: int, action: Callable[[int], Any], *, join: bool = True) -> list[Any]:
    """Run ``action(rank)`` in ``count`` processes; what each returned, all of which must end well.

    Args:
        count: Number of processes.
        action: What torch.save can write is returned.
        join: Whether the processes form a gloo group before ``action``.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = addresses(count)

        def work(rank: int) -> None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            if join:
                dist.init_process_group("gloo")
            result = action(rank)
            torch.save(result, Path(folder) / f"{rank}.pt")
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()

        def start(rank: int) -> int:
            return start_fork(lambda: work(rank), environment=environment)

        children = [start(rank) for rank in range(count)]
        codes = wait_for_all(children)
        assert codes == [0] * count, codes
        files = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        return [torch.load(file, weights_only=False) for file in files]


def addresses(count: int) -> dict[str, str]:
    """The environment in which ``count`` processes of this machine find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}


class Silent:
    """A pulse that nobody feels."""

    def beat(self, step: int, phase: str) -> None:
        pass


class NoStop:
    """Nobody asks for a stop."""

    def reason(self) -> None:
        return None

    def honour(self) -> None:
        pass
