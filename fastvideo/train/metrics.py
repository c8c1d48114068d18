# SPDX-License-Identifier: Apache-2.0
"""Numbers of a run: ``metrics.jsonl``, TensorBoard and trackers, without repeats after a resume."""

import json
import math
import resource
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.tensorboard import SummaryWriter

from fastvideo import atomic
from fastvideo.config.train import Train
from fastvideo.errors import Failed
from fastvideo.state import TrainDir
from fastvideo.train.trackers import WandbRun

Value = float | int | list[float]

AXES = ("samples", "tokens")
"""What `CURVES` are drawn against in TensorBoard, beside the step."""
CURVES = ("loss", "heldout_loss")


class Metrics:
    """Writes a line per record; ``step`` is the number of finished optimizer steps."""

    def __init__(
        self, directory: TrainDir, *, start_step: int, train: Train, measured: bool = True
    ) -> None:
        """Drop what a killed run logged after the checkpoint that this one starts from.

        Also the held-out loss of that step, if it is to be ``measured`` again.
        """
        directory.root.mkdir(parents=True, exist_ok=True)
        kept = _keep_until(directory, start_step, measured=measured)
        self._file = open(directory.metrics, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        # Records may be rarer than checkpoints, at whose step pictures are shown once.
        until = start_step if start_step and measured else -1
        self._boards = _boards(directory, kept, until=until) if train.tensorboard else {}
        self._wandb = None
        if train.wandb is not None:
            self._wandb = WandbRun(directory, start_step=start_step, train=train)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one record.

        JSON has no numbers that are not finite: they become null there.

        Raises:
            Failed: The disk does not take it.
        """
        record = {"step": step, **{name: _finite(value) for name, value in values.items()}}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise Failed(
                f"{self._file.name}: cannot be written ({error.strerror}); complete checkpoints "
                "are intact. Free some space, and run the same command again"
            ) from error
        scalars = {n: float(v) for n, v in values.items() if not isinstance(v, list)}
        if self._boards:
            self._draw({"step": step, **scalars})
        if self._wandb is not None:
            self._wandb.write(step, scalars)

    def show(self, step: int, images: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """Draw pictures (H, W, 3) after a step, by name."""
        if self._boards:
            for name, image_HWC in images.items():
                self._boards["step"].add_image(name, image_HWC, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.show(step, images)

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        for board in self._boards.values():
            board.close()
        if self._wandb is not None:
            self._wandb.close()

    def _draw(self, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            if name != "step":
                self._boards["step"].add_scalar(name, value, int(scalars["step"]))
        for axis in AXES:
            for name in CURVES:
                if axis in scalars and name in scalars:
                    at = int(scalars[axis])
                    self._boards[axis].add_scalar(f"by_{axis}/{name}", scalars[name], at)


def _boards(
    directory: TrainDir, kept: list[dict[str, Any]], *, until: int
) -> dict[str, SummaryWriter]:
    """An event file for each x axis: a resume makes TensorBoard forget all beyond its point of x.

    What a killed run logged after ``kept`` and the step ``until`` is forgotten in this way.
    """
    folders = {"step": directory.tensorboard}
    folders |= {axis: directory.tensorboard / f"by_{axis}" for axis in AXES}
    last = {axis: max((r[axis] for r in kept if axis in r), default=-1) for axis in folders}
    last["step"] = max(last["step"], until)
    return {
        axis: SummaryWriter(str(folder), purge_step=last[axis] + 1)
        for axis, folder in folders.items()
    }


def _keep_until(directory: TrainDir, step: int, *, measured: bool) -> list[dict[str, Any]]:
    """Cut off the records after ``step``, all of them if it is 0; those that stay."""
    if not directory.metrics.exists():
        return []
    kept, records = [], []
    for line in directory.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # cut by a kill
        again = not measured and record["step"] == step and "heldout_loss" in record
        if step and record["step"] <= step and not again:
            kept.append(line)
            records.append(record)
    atomic.write_bytes(directory.metrics, "".join(kept).encode(), point="metrics")
    return records


def _finite(value: Value) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value if math.isfinite(value) else None


def peak_memory_gib(device: str) -> float:
    """Most memory this process has held: on the GPU if it trains there, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
