# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: torch's distributed checkpoints, made complete by a marker."""

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fastvideo import atomic, state
from fastvideo.errors import UserError
from fastvideo.state import TrainDir


@dataclass(frozen=True)
class Saved:
    """The parts of a training state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def save(directory: TrainDir, saved: Saved, *, step: int, about: Mapping[str, Any]) -> Path:
    """Write the checkpoint after ``step``; ``about`` (plain values) goes into its marker.

    Tensors go to a temporary folder, then it is renamed, then the marker is written: a kill at any
    moment leaves the checkpoint complete or not counted.
    """
    folder = directory.checkpoint(step)
    temporary = atomic.temporary_name(folder)
    directory.checkpoints.mkdir(parents=True, exist_ok=True)
    # The run's lock is ours: what lies here without a marker is left of a kill.
    for leftover in (*directory.checkpoints.glob(".step-*.tmp"), folder):
        shutil.rmtree(leftover, ignore_errors=True)
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer)
    with _alone() as no_dist:
        dcp_save(
            {"model": model_state, "optimizer": optimizer_state},
            storage_writer=FileSystemWriter(temporary, sync_files=False),
            no_dist=no_dist,
        )
    atomic.fault("checkpoint.write")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        atomic.sync(path)
        atomic.fault("checkpoint.fsync")
    atomic.sync(temporary)
    os.replace(temporary, folder)
    atomic.fault("checkpoint.rename")
    atomic.sync(directory.checkpoints)
    sizes = {str(path.relative_to(temporary)): _size(folder, path, temporary) for path in files}
    marker = {**about, "id": uuid.uuid4().hex, "step": step, "files": sizes}
    atomic.write_json(state.checkpoint_marker(folder), marker, point="checkpoint.marker")
    return folder


def amend(folder: Path, **about: Any) -> None:
    """Change what the marker of a complete checkpoint says."""
    marker = state.read_checkpoint_marker(folder)
    assert marker is not None
    path = state.checkpoint_marker(folder)
    atomic.write_json(path, {**marker, **about}, point="checkpoint.marker")


def load(folder: Path, saved: Saved) -> None:
    """Read a complete checkpoint into ``saved``, bit for bit; hyper-parameters stay as they are."""
    settings = [_settings(group) for group in saved.optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer)
    wanted: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    _load(folder, wanted)
    set_state_dict(
        saved.model,
        saved.optimizer,
        model_state_dict=wanted["model"],
        optim_state_dict=wanted["optimizer"],
    )
    for group, values in zip(saved.optimizer.param_groups, settings, strict=True):
        group.update(values)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read only the model's weights of a complete checkpoint."""
    wanted = model.state_dict()
    _load(folder, {"model": wanted})
    model.load_state_dict(wanted)


def _load(folder: Path, wanted: dict[str, Any]) -> None:
    try:
        with _alone() as no_dist:
            dcp_load(wanted, storage_reader=FileSystemReader(folder), no_dist=no_dist)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder}: does not fit the model of this recipe or is damaged ({error}); choose the "
            "recipe it was trained with, or remove the folder to go on from the one before"
        ) from error


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Yield whether this is the only process; torch need not warn that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield not torch.distributed.is_initialized()


def _size(folder: Path, path: Path, temporary: Path) -> int:
    return (folder / path.relative_to(temporary)).stat().st_size
