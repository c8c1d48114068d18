# SPDX-License-Identifier: Apache-2.0
"""Starts that gain no step are counted, and a third one is the last."""

import json
from pathlib import Path

import pytest

from fastvideo.errors import UserError
from fastvideo.state import TrainDir, checkpoint_marker
from fastvideo.train import attempts


def save(directory: TrainDir, step: int) -> None:
    marker = checkpoint_marker(directory.checkpoint(step))
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"files": {}, "step": step, "measured": True}))


def test_a_fourth_start_from_one_step_is_refused_until_forced(tmp_path: Path) -> None:
    directory = TrainDir(tmp_path)
    for _ in range(attempts.LIMIT):
        attempts.count(directory, force=False)
    with pytest.raises(UserError, match=r"3 starts from step 0 .* saved no further step") as caught:
        attempts.count(directory, force=False)
    for part in (str(directory.attempts), str(directory.launches), "--force", "every_minutes"):
        assert part in str(caught.value)
    attempts.count(directory, force=True)
    attempts.count(directory, force=False)
    assert json.loads(directory.attempts.read_text())["starts"] == 2


def test_a_gained_step_counts_from_one(tmp_path: Path) -> None:
    directory = TrainDir(tmp_path)
    for step in (2, 4, 6):
        for _ in range(attempts.LIMIT):
            attempts.count(directory, force=False)
        save(directory, step)
    attempts.count(directory, force=False)
    found = json.loads(directory.attempts.read_text())
    assert (found["step"], found["starts"]) == (6, 1)


def test_a_start_that_is_taken_back_does_not_count(tmp_path: Path) -> None:
    directory = TrainDir(tmp_path)
    attempts.forget(directory)
    for _ in range(2 * attempts.LIMIT):
        attempts.count(directory, force=False)
        attempts.forget(directory)
    assert json.loads(directory.attempts.read_text())["starts"] == 0


def test_a_damaged_count_starts_anew(tmp_path: Path) -> None:
    directory = TrainDir(tmp_path)
    directory.attempts.write_text("{")
    attempts.count(directory, force=False)
    assert json.loads(directory.attempts.read_text())["starts"] == 1
