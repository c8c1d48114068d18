# SPDX-License-Identifier: Apache-2.0
"""Traces of a few steps."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.config.train import Profile
from fastvideo.train.profile import Profiler


def run(spec: Profile | None, folder: Path, *, steps: int, start_step: int = 0) -> None:
    with Profiler(spec, folder, rank=3, start_step=start_step) as profiler:
        for step in range(start_step + 1, start_step + steps + 1):
            with torch.profiler.record_function(f"number {step}"):
                torch.randn(8, 8) @ torch.randn(8, 8)
            profiler.step()


def traced_steps(file: Path) -> list[str]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted({e["name"] for e in events if e.get("name", "").startswith("number")})


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    run(Profile(first_step=3, steps=2), tmp_path, steps=7)
    assert traced_steps(tmp_path / "rank-3-step-3.json.gz") == ["number 3", "number 4"]
    assert "aten::mm" in (tmp_path / "rank-3-step-3.txt").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_resumed_run_counts_from_its_own_first_step(tmp_path: Path) -> None:
    run(Profile(first_step=2, steps=1), tmp_path, steps=4, start_step=100)
    assert traced_steps(tmp_path / "rank-3-step-102.json.gz") == ["number 102"]


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_the_very_first_step_can_be_traced(tmp_path: Path) -> None:
    run(Profile(first_step=1, steps=1), tmp_path, steps=2)
    assert traced_steps(tmp_path / "rank-3-step-1.json.gz") == ["number 1"]


def test_training_that_ends_while_it_records_leaves_what_there_is(tmp_path: Path) -> None:
    run(Profile(first_step=2, steps=9), tmp_path, steps=3)
    assert traced_steps(tmp_path / "rank-3-step-2.json.gz") == ["number 2", "number 3"]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_training_that_ends_before_leaves_nothing(steps: int, tmp_path: Path) -> None:
    run(Profile(first_step=5, steps=2), tmp_path, steps=steps)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_training_comes_through(tmp_path: Path) -> None:
    spec = Profile(first_step=2, steps=9)
    with pytest.raises(ZeroDivisionError), Profiler(spec, tmp_path, rank=0) as profiler:
        for _ in range(2):
            torch.ones(1) + 1
            profiler.step()
        raise ZeroDivisionError


def test_no_profile_is_no_work(tmp_path: Path) -> None:
    run(None, tmp_path / "none", steps=9)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, logger="fastvideo"):
        run(Profile(first_step=2, steps=1), tmp_path / "file", steps=3)
    assert "could not be written" in caplog.text
