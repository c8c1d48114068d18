# SPDX-License-Identifier: Apache-2.0
"""Numbers of a run: ``metrics.jsonl`` and TensorBoard, without repeats after a resume."""

import json
import resource
from collections.abc import Mapping

import torch
from torch.utils.tensorboard import SummaryWriter

from fastvideo import atomic
from fastvideo.state import TrainDir

Value = float | int | list[float]


class Metrics:
    """Writes a line per record; ``step`` is the number of finished optimizer steps."""

    def __init__(self, directory: TrainDir, *, start_step: int) -> None:
        """Drop what a killed run logged after the checkpoint that this one starts from."""
        directory.root.mkdir(parents=True, exist_ok=True)
        _keep_until(directory, start_step)
        self._file = open(directory.metrics, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        self._board = SummaryWriter(str(directory.tensorboard), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one record."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if not isinstance(value, list):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._board.close()


def _keep_until(directory: TrainDir, step: int) -> None:
    if not directory.metrics.exists():
        return
    kept = []
    for line in directory.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut by a kill
        if step and record["step"] <= step:
            kept.append(line)
    atomic.write_bytes(directory.metrics, "".join(kept).encode(), point="metrics")


def peak_memory_gib(device: str) -> float:
    """Most memory this process has held: on the GPU if it trains there, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
