# SPDX-License-Identifier: Apache-2.0
"""Saving changes nothing of what is saved, and says what went wrong whatever it meets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastvideo.checkpoint import Saved, resume
from fastvideo.config.train import Checkpoints
from fastvideo.errors import Failed
from fastvideo.state import TrainDir
from fastvideo.train.saver import Copy, Saver, _share

ABOUT = {"losses": [], "measured": True}


def state_of_a_model() -> Saved:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return Saved(model, torch.optim.AdamW(model.parameters(), fused=True))


def step(saved: Saved) -> None:
    saved.model(torch.ones(1, 3)).sum().backward()
    saved.optimizer.step()
    saved.optimizer.zero_grad()


def saver(root: Path) -> Saver:
    return Saver(TrainDir(root), spec=Checkpoints(), group=None)


def test_a_save_before_the_first_step_does_not_count_as_one(tmp_path: Path) -> None:
    plain, early = state_of_a_model(), state_of_a_model()
    saver(tmp_path).save(early, step=1, about=ABOUT, wait=True)
    for saved in (plain, early):
        step(saved)
        step(saved)
    assert torch.equal(plain.model.weight, early.model.weight)  # type: ignore[arg-type]
    resumed = state_of_a_model()
    marker = resume(TrainDir(tmp_path), resumed)
    assert marker is not None and marker["step"] == 1
    step(resumed)
    step(resumed)
    assert torch.equal(plain.model.weight, resumed.model.weight)  # type: ignore[arg-type]


def test_a_failure_in_the_background_is_raised_whatever_becomes_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fastvideo.train.saver._write_files", gone)
    writing = saver(tmp_path)
    writing.save(state_of_a_model(), step=1, about=ABOUT, wait=False)
    with pytest.raises(Failed, match=r"step-00000001: cannot be saved \(.*Input/output error\)"):
        writing.finish()
    monkeypatch.setattr("shutil.disk_usage", gone)
    writing.save(state_of_a_model(), step=1, about=ABOUT, wait=False)
    with pytest.raises(OSError, match="Input/output error"):
        writing.finish()


def test_old_checkpoints_that_cannot_be_removed_are_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr("fastvideo.state.prune_checkpoints", busy)
    saver(tmp_path).save(state_of_a_model(), step=1, about=ABOUT, wait=True)
    assert TrainDir(tmp_path).complete_checkpoints() == [1]


def test_copies_share_the_writing_evenly_and_leave_nothing_out() -> None:
    state: dict[str, dict[str, Any]] = {
        "model": {f"w{size}": torch.empty(size) for size in (1000, 900, 500, 300, 60, 7)},
        "optimizer": {"a.step": torch.tensor(1.0), "a.lr": 1e-3, "b": torch.empty(800)},
    }
    parts = [_share(state, Copy(number, 3)) for number in range(3)]
    for name, values in state.items():
        written = [key for part in parts for key in part[name]]
        assert sorted(written) == sorted(values), "each once"
    loads = [
        sum(
            v.numel()
            for values in part.values()
            for v in values.values()
            if not isinstance(v, float)
        )
        for part in parts
    ]
    assert max(loads) <= 1.25 * min(loads)
    assert _share(state, Copy()) == state
