# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: torch's distributed checkpoints, made complete by a marker."""

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from fastvideo import atomic, state
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.state import TrainDir

FLAT = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)
"""State by the name of its parameter, so that layouts may group parameters as they like; what is
frozen is in no checkpoint."""
CHUNK = 1 << 24
Part = Literal["model", "average"]


@dataclass(frozen=True)
class Saved:
    """The parts of a training state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] = field(default_factory=dict)
    """Of what trains, by name; empty without one."""


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
        if rank_of(group) == 0:
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
    """Read a complete checkpoint into ``saved``, saved by any number of processes.

    An average that it lacks, because none was kept so far, begins with its weights.
    """
    settings = [_settings(group) for group in saved.optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer, options=FLAT)
    wanted: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    has_average = bool(saved.average) and _has(folder, "average")
    if has_average:
        wanted["average"] = saved.average
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
    if not has_average:
        begin_average(saved)


@torch.no_grad()
def begin_average(saved: Saved) -> None:
    """Let the average, if one is kept, be what the weights are."""
    parameters = dict(saved.model.named_parameters())
    for name, averaged in saved.average.items():
        averaged.copy_(parameters[name])


def part_of(folder: Path, *, average: bool) -> Part:
    """The average of a complete checkpoint, if it is wanted and there is one, else its weights."""
    marker = state.read_checkpoint_marker(folder)
    assert marker is not None
    if average and not marker.get("average"):
        logger.warning("%s: was trained without train.ema; its last weights are taken", folder)
        return "model"
    return "average" if average else "model"


def load_weights(
    folder: Path,
    model: nn.Module,
    *,
    part: Part = "model",
    group: dist.ProcessGroup | None = None,
) -> None:
    """Read what trains of a model, or its average, of a complete checkpoint; see `verify`."""
    wanted: dict[str, Any] = dict(get_model_state_dict(model, options=FLAT))
    _load(folder, {part: wanted}, group=group)
    set_model_state_dict(model, wanted, options=FLAT)


def read_tensors(
    folder: Path, like: Mapping[str, Tensor], *, part: Part = "model"
) -> dict[str, Tensor]:
    """Read some tensors of the model, or of its average, in a complete checkpoint to the host.

    They have the shapes and dtypes of ``like``; numbers are rounded where its dtype is narrower.

    Raises:
        UserError: The checkpoint lacks some, or has them with other shapes.
    """
    found = {name: torch.empty_like(tensor, device="cpu") for name, tensor in like.items()}
    _load(folder, {part: found})
    return found


def _has(folder: Path, part: Part) -> bool:
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    return any(name.startswith(f"{part}.") for name in names)


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _damaged(folder: Path, marker: Mapping[str, Any], group: dist.ProcessGroup | None) -> list[str]:
    """Files whose content is not what was written; each process looks at some of them."""
    rank = rank_of(group)
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
        with warned_already():
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


def rank_of(group: dist.ProcessGroup | None) -> int:
    """Number of this process in a group; 0 without one."""
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
def warned_already() -> Iterator[None]:
    """A single process need not be told that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield
