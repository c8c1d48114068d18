# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: torch's distributed checkpoints, made complete by a marker."""

import contextlib
import os
import shutil
import socket
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

from fastvideo import state
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
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    directory.checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in (*directory.checkpoints.glob(".step-*.tmp"), folder):
        shutil.rmtree(leftover, ignore_errors=True)
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer)
    with _alone() as no_dist:
        dcp_save(
            {"model": model_state, "optimizer": optimizer_state},
            storage_writer=FileSystemWriter(temporary, sync_files=False),
            no_dist=no_dist,
        )
    state.fault("checkpoint.write")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        state.sync(path)
        state.fault("checkpoint.fsync")
    state.sync(temporary)
    os.replace(temporary, folder)
    state.fault("checkpoint.rename")
    state.sync(directory.checkpoints)
    sizes = {str(path.relative_to(temporary)): _size(folder, path, temporary) for path in files}
    marker = {**about, "step": step, "files": sizes}
    state.write_json(state.checkpoint_marker(folder), marker, point="checkpoint.marker")
    return folder


def load(folder: Path, saved: Saved) -> None:
    """Read a complete checkpoint into ``saved``, bit for bit."""
    model_state, optimizer_state = get_state_dict(saved.model, saved.optimizer)
    wanted: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    _load(folder, wanted)
    set_state_dict(
        saved.model,
        saved.optimizer,
        model_state_dict=wanted["model"],
        optim_state_dict=wanted["optimizer"],
    )


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


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Yield whether this is the only process; torch need not warn that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
        yield not torch.distributed.is_initialized()


def _size(folder: Path, path: Path, temporary: Path) -> int:
    return (folder / path.relative_to(temporary)).stat().st_size
