# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: torch's distributed checkpoints, made complete by a marker."""

import contextlib
import os
import shutil
import threading
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastvideo import atomic, state
from fastvideo.config.train import Checkpoints
from fastvideo.errors import Failed, UserError
from fastvideo.log import logger
from fastvideo.state import TrainDir

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""State by the name of its parameter, so that layouts may group parameters as they like."""
CHUNK = 1 << 24


@dataclass(frozen=True)
class Saved:
    """The parts of a training state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


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
        if _rank(self._group) == 0:
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
            if _rank(self._group) == 0:
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
    return {"model": model_state, "optimizer": optimizer_state}


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
    with _warned_already():
        dcp_save(
            tensors,
            storage_writer=FileSystemWriter(temporary, sync_files=False),
            process_group=group,
            no_dist=group is None,
        )
    atomic.fault("checkpoint.write")


def _flushed(temporary: Path, group: dist.ProcessGroup | None) -> dict[str, int]:
    """Bring our files to the disk; the CRC-32 of all files by name, on process 0."""
    rank = _rank(group)
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


def amend(folder: Path, **about: Any) -> None:
    """Change what the marker of a complete checkpoint says."""
    marker = state.read_checkpoint_marker(folder)
    assert marker is not None
    path = state.checkpoint_marker(folder)
    atomic.write_json(path, {**marker, **about}, point="checkpoint.marker")


def resume(
    directory: TrainDir, saved: Saved, *, group: dist.ProcessGroup | None = None
) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole, bit for bit; hyper-parameters stay as they are.

    Damaged ones are told, and once the one before them is loaded they are set aside: their marker
    is renamed, so that nothing takes them for whole.

    Returns:
        The marker of the one that was loaded; None if there is none.

    Raises:
        UserError: All are damaged, or the newest whole one is of another model.
    """
    markers = _same(_markers(directory), group)
    damaged = []
    for step in sorted(markers, reverse=True):
        folder = directory.checkpoint(step)
        names = _damaged(folder, markers[step], group)
        if names:
            damaged.append(folder)
            logger.warning("%s: %s is damaged; going back to the one before", folder, names[0])
            continue
        load(folder, saved, group=group)
        if _rank(group) == 0:
            for other in damaged:
                state.checkpoint_marker(other).rename(other / "damaged.json")
        logger.info("continuing from %s", folder)
        found: dict[str, Any] = markers[step]
        return found
    if damaged:
        raise UserError(
            f"{directory.checkpoints}: every checkpoint is damaged; remove the folder to start "
            "anew, or bring back a copy"
        )
    return None


def _markers(directory: TrainDir) -> dict[int, Any]:
    """What was written of checkpoints when they were complete, whatever became of them."""
    found = {
        step: atomic.read_json(state.checkpoint_marker(folder))
        for step, folder in directory.checkpoint_folders().items()
    }
    return {step: marker for step, marker in found.items() if isinstance(marker, dict)}


def verify(folder: Path) -> None:
    """Compare every file with what was written; a ``UserError`` names one that differs."""
    marker = state.read_checkpoint_marker(folder)
    assert marker is not None
    if damaged := _damaged(folder, marker, None):
        raise UserError(
            f"{folder / damaged[0]}: is damaged (its checksum differs); remove the folder to take "
            "the checkpoint before, or bring back a copy"
        )


def load(folder: Path, saved: Saved, *, group: dist.ProcessGroup | None = None) -> None:
    """Read a complete checkpoint into ``saved``, saved by any number of processes."""
    settings = [_settings(group) for group in saved.optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer, options=FLAT)
    wanted: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    _load(folder, wanted, group=group)
    set_state_dict(
        saved.model,
        saved.optimizer,
        model_state_dict=wanted["model"],
        optim_state_dict=wanted["optimizer"],
        options=FLAT,
    )
    for group_now, values in zip(saved.optimizer.param_groups, settings, strict=True):
        group_now.update(values)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read only the model's weights of a complete checkpoint; see `verify`."""
    wanted = model.state_dict()
    _load(folder, {"model": wanted})
    model.load_state_dict(wanted)


def read_tensors(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read some of the model's tensors in a complete checkpoint, and nothing else, to the host.

    They have the shapes and dtypes of ``like``; numbers are rounded where its dtype is narrower.

    Raises:
        UserError: The checkpoint lacks some, or has them with other shapes.
    """
    found = {name: torch.empty_like(tensor, device="cpu") for name, tensor in like.items()}
    _load(folder, {"model": found})
    return found


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _damaged(folder: Path, marker: Mapping[str, Any], group: dist.ProcessGroup | None) -> list[str]:
    """Files whose content is not what was written; each process looks at some of them."""
    rank = _rank(group)
    size = dist.get_world_size(group) if group is not None else 1
    names = sorted(marker["crc32"])[rank::size]
    found = [name for name in names if not _is_whole(folder / name, marker)]
    if group is None:
        return found
    gathered: list[list[str]] = [[] for _ in range(size)]
    dist.all_gather_object(gathered, found, group=group)
    return sorted(name for part in gathered for name in part)


def _is_whole(path: Path, marker: Mapping[str, Any]) -> bool:
    try:
        if path.stat().st_size != marker["files"][path.name]:
            return False
        return crc32(path) == int(marker["crc32"][path.name])
    except OSError as error:
        logger.warning("%s: %s", path, error.strerror)
        return False


def _load(folder: Path, wanted: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    try:
        with _warned_already():
            dcp_load(
                wanted,
                storage_reader=FileSystemReader(folder),
                process_group=group,
                no_dist=group is None,
            )
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder}: does not fit the model of this recipe or is damaged ({error}); choose the "
            "recipe it was trained with, or remove the folder to go on from the one before"
        ) from error


def _copied(tree: Any) -> Any:
    """Copy tensors to the host, so that training may change the originals."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _same(value: Any, group: dist.ProcessGroup | None) -> Any:
    """What process 0 sees, in all of them: file systems of a cluster may lag."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


@contextlib.contextmanager
def _warned_already() -> Iterator[None]:
    """A single process need not be told that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield
