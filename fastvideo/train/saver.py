# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints, beside training or while it waits; ``fastvideo.checkpoint`` reads them."""

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastvideo import atomic, state
from fastvideo.checkpoint import FLAT, Saved, crc32, rank_of, warned_already
from fastvideo.config.train import Checkpoints
from fastvideo.errors import Failed
from fastvideo.log import logger
from fastvideo.state import TrainDir


@dataclass(frozen=True)
class Copy:
    """Which of several equal copies of the state a process holds, or a part of which."""

    number: int = 0
    count: int = 1


class Saver:
    """Writes checkpoints, one at a time, while training goes on or while it waits.

    All processes call the same methods in the same order.
    """

    def __init__(
        self,
        directory: TrainDir,
        *,
        spec: Checkpoints,
        group: dist.ProcessGroup | None,
        copy: Copy = Copy(),
    ) -> None:
        """Write for a group of processes.

        Args:
            directory: Of the training.
            spec: When to keep what.
            group: A gloo group that nothing else uses; None in a single process.
            copy: Each copy writes, and holds in host memory meanwhile, its share of the tensors.
        """
        self._directory, self._spec, self._group = directory, spec, group
        self._copy = copy
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, saved: Saved, *, step: int, about: Mapping[str, Any], wait: bool) -> None:
        """Write the checkpoint after ``step``; ``about`` (plain values) goes into its marker.

        Tensors go to a temporary folder, then it is renamed, then the marker is written: a kill at
        any moment leaves the checkpoint complete or not counted.

        Args:
            saved: Copied before this returns.
            step: Finished optimizer steps.
            about: The same in all processes.
            wait: Return when it is complete; else `check` or the next save tells of a failure.

        Raises:
            Failed: This one or the one before could not be written; complete ones are intact.
        """
        self.finish()
        tensors = _share(_state_of(saved), self._copy)
        self._begin(step)
        if wait or not self._spec.asynchronous:
            self._write(tensors, step, about)
            self.check()
            return
        staged = _copied(tensors)
        # A daemon: a process that ends on an error does not wait for the others in here.
        self._thread = threading.Thread(
            target=self._beside, args=(staged, step, about), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what a checkpoint in the background failed with."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _begin(self, step: int) -> None:
        """Make place; all processes must see it made before one writes."""
        checkpoints, folder = self._directory.checkpoints, self._directory.checkpoint(step)
        if rank_of(self._group) == 0:
            checkpoints.mkdir(parents=True, exist_ok=True)
            # The run's lock is ours: what lies here without a marker is left of a kill.
            for leftover in (*checkpoints.glob(".step-*.tmp"), folder):
                shutil.rmtree(leftover, ignore_errors=True)
        if self._group is not None:
            dist.barrier(self._group)

    def _beside(self, tensors: dict[str, Any], step: int, about: Mapping[str, Any]) -> None:
        """Write in a thread, which starts on GPU 0 whatever the process trains on."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        self._write(tensors, step, about)

    def _write(self, tensors: dict[str, Any], step: int, about: Mapping[str, Any]) -> None:
        folder = self._directory.checkpoint(step)
        temporary = folder.with_name(f".{folder.name}.tmp")
        try:
            _write_files(temporary, tensors, self._group)
            sums = _flushed(temporary, self._group)
            if rank_of(self._group) == 0:
                _complete(temporary, folder, {**about, "step": step}, sums)
                logger.info("saved %s", folder)
                self._prune()
        except (OSError, CheckpointException) as error:
            self._error = error  # whatever explaining it meets
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._error = Failed(self._explain(folder, error))
        except Exception as error:  # a partner that died, say; a thread's would be lost
            self._error = error

    def _prune(self) -> None:
        keep = self._spec
        try:
            state.prune_checkpoints(
                self._directory, keep_last=keep.keep_last, keep_every=keep.keep_every
            )
        except OSError as error:  # say, a reader on a network file system: the next one tries again
            logger.warning("%s: old checkpoints are left (%s)", self._directory.checkpoints, error)

    def _explain(self, folder: Path, error: BaseException) -> str:
        found = self._directory.complete_checkpoints()
        left = (
            f"complete ones are intact, the newest is of step {found[-1]}"
            if found
            else ("there is none before it")
        )
        reason = str(error).strip().splitlines()
        gib = shutil.disk_usage(self._directory.root).free / 2**30
        return (
            f"{folder}: cannot be saved ({reason[-1] if reason else type(error).__name__}); "
            f"{gib:.2f} GiB are free on that disk; {left}. Free some space, or lower "
            "train.checkpoint.keep_last, and run the same command again"
        )


def _state_of(saved: Saved) -> dict[str, Any]:
    """All tensors by name.

    torch makes the state of an optimizer that has not stepped yet by a step that changes nothing
    but its count, which is taken back: when a run saves must not change what it computes.
    """
    begun = bool(saved.optimizer.state)
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer, options=FLAT)
    if not begun:
        for name, value in optimizer_state.items():
            if name.endswith(".step") and isinstance(value, Tensor):
                value.zero_()
    averaged = {"average": saved.average} if saved.average else {}
    return {"model": model_state, "optimizer": optimizer_state, **averaged}


def _share(state: dict[str, Any], copy: Copy) -> dict[str, Any]:
    """What one of several equal copies writes: tensors, largest first, to whom has least so far."""
    sizes = {
        (part, name): value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        for part, values in state.items()
        for name, value in values.items()
    }
    loads = [0] * copy.count
    ours: dict[str, Any] = {part: {} for part in state}
    for part, name in sorted(sizes, key=lambda key: (-sizes[key], key)):
        least = loads.index(min(loads))
        loads[least] += sizes[part, name]
        if least == copy.number:
            ours[part][name] = state[part][name]
    return ours


def _write_files(temporary: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    with warned_already():
        dcp_save(
            tensors,
            storage_writer=FileSystemWriter(temporary, sync_files=False),
            process_group=group,
            no_dist=group is None,
        )
    atomic.fault("checkpoint.write")


def _flushed(temporary: Path, group: dist.ProcessGroup | None) -> dict[str, int]:
    """Bring our files to the disk; the CRC-32 of all files by name, on process 0."""
    rank = rank_of(group)
    ours = [path for path in sorted(temporary.iterdir()) if _writer(path) == rank]
    sums = {}
    for path in ours:
        atomic.sync(path)
        sums[path.name] = crc32(path)
        atomic.fault("checkpoint.fsync")
    if group is None:
        return sums
    gathered: list[dict[str, int]] | None = [{}] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(sums, gathered, group=group, group_dst=0)
    return {name: crc for part in gathered or [] for name, crc in part.items()}


def _writer(path: Path) -> int:
    """The process that wrote a file: ``__3_0.distcp`` is of process 3, the metadata of 0."""
    number = path.name.removeprefix("__").partition("_")[0]
    return int(number) if number.isdigit() else 0


def _complete(
    temporary: Path, folder: Path, about: Mapping[str, Any], sums: Mapping[str, int]
) -> None:
    atomic.sync(temporary)
    os.replace(temporary, folder)
    atomic.fault("checkpoint.rename")
    atomic.sync(folder.parent)
    sizes = {name: (folder / name).stat().st_size for name in sums}
    marker = {**about, "id": uuid.uuid4().hex, "files": sizes, "crc32": dict(sums)}
    atomic.write_json(state.checkpoint_marker(folder), marker, point="checkpoint.marker")


def _copied(tree: Any) -> Any:
    """Copy tensors to the host, so that training may change the originals."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree
