# SPDX-License-Identifier: Apache-2.0
"""Wan2.2 A14B: two trainings in a run, one after the other.

Axes: N timesteps.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvideo.state import RunDir, read_checkpoint_marker
from fastvideo.train import loop
from fastvideo.train.launcher import train
from tests.experts_job import (
    ACCUMULATED,
    HIGH,
    LOW,
    Trained,
    assert_same,
    identity,
    losses,
    losses_if_any,
    numbers,
    preprocessed,
    ran,
    records,
    train_there,
    train_undisturbed,
    weights,
)
from tests.tiny_world import World, digests, in_fork


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return preprocessed(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Trained:
    return train_undisturbed(world)


def test_transformers_are_called_with_timesteps_of_their_interval(undisturbed: Trained) -> None:
    for folder, timesteps in undisturbed.timesteps.items():
        assert len(timesteps) == 4 * 4 + 3 * 2, "4 samples a step; held out at 0, 3 and 4"
        assert on_its_side(torch.tensor(timesteps), folder, 0.875)


def on_its_side(timestep_N: torch.Tensor, folder: str, boundary: float) -> bool:
    """As the pipeline chooses an expert, step by step."""
    assert timestep_N.dtype == torch.float32
    is_high = [bool(t >= boundary * 1000) for t in timestep_N]
    return all(is_high) if folder == HIGH else not any(is_high)


def test_both_experts_have_checkpoints_metrics_and_weights_of_their_own(
    world: World, undisturbed: Trained
) -> None:
    """The tiny experts differ from the start; a mix-up would show."""
    run_dir, base = undisturbed.run_dir, Path(world.load().model.path)
    assert losses(run_dir, HIGH) != losses(run_dir, LOW)
    for folder in (HIGH, LOW):
        directory = RunDir(run_dir).training(folder)
        assert directory.complete_checkpoints() == [2, 4]
        assert [r["step"] for r in records(run_dir, folder)] == [0, 1, 2, 3, 3, 4, 4]
        marker = read_checkpoint_marker(directory.checkpoint(4))
        interval = [0.875, 1.0] if folder == HIGH else [0.0, 0.875]
        assert marker is not None and marker["about"]["interval"] == interval
        trained, others = numbers(run_dir, folder), {HIGH: LOW, LOW: HIGH}
        moved = {
            name: max(
                float((trained[f"/model/{key}"] - tensor).abs().max())
                for key, tensor in weights(base / name).items()
            )
            for name in (folder, others[folder])
        }
        # Four steps at a rate of 1e-3 move no weight by more than about 4e-3.
        assert 1e-4 < moved[folder] < 5e-3
        assert moved[others[folder]] > 0.1, "this is not the other expert"


def test_accumulated_losses_are_those_of_one_batch(
    world: World, undisturbed: Trained, tmp_path: Path
) -> None:
    for name, override in (("one", "train.micro_batch_size=null"), ("four", "micro_batch_size=1")):
        key = override if override.startswith("train.") else f"train.{override}"
        assert ran(train_there(world, tmp_path / name, key)) == {HIGH: True, LOW: True}
        for folder in (HIGH, LOW):
            for found, expected in zip(
                records(tmp_path / name, folder), records(undisturbed.run_dir, folder), strict=True
            ):
                assert found.keys() == expected.keys()
                for number in set(found) & {"loss", "heldout_loss", "grad_norm"}:
                    assert found[number] == pytest.approx(expected[number], rel=1e-5)


KILLS: tuple[tuple[str, int, str, set[str]], ...] = (
    # fault point, its pass counted over both experts, the expert it is in, those left to train
    ("checkpoint.write", 1, HIGH, {HIGH, LOW}),
    ("checkpoint.marker.done", 2, HIGH, {LOW}),
    ("recipe.done", 2, LOW, {LOW}),
    ("checkpoint.rename", 3, LOW, {LOW}),
    ("checkpoint.marker.done", 4, LOW, set()),
)


@pytest.mark.parametrize("kill", KILLS, ids=[f"{point}:{nth}" for point, nth, *_ in KILLS])
def test_a_kill_in_either_expert_changes_no_bit(
    world: World, undisturbed: Trained, tmp_path: Path, kill: tuple[str, int, str, set[str]]
) -> None:
    point, nth, folder, left = kill
    assert f"{point}:{nth}" in undisturbed.fault_points
    recipe = world.load(f"run_dir={tmp_path}", *ACCUMULATED)
    assert in_fork(lambda: train(recipe), fault=f"{point}:{nth}") == -9
    assert RunDir(tmp_path).training(LOW).recipe.exists() == (folder == LOW)
    finished = {name: identity(tmp_path, name) for name in {HIGH, LOW} - left}
    assert ran(train_there(world, tmp_path)) == {HIGH: HIGH in left, LOW: LOW in left}
    for name, before in finished.items():
        assert identity(tmp_path, name) == before, "not trained again"
    assert_same(tmp_path, undisturbed.run_dir)


def stop_file(run_dir: Path) -> None:
    RunDir(run_dir).stop.touch()


def terminate(run_dir: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("ask", [stop_file, terminate])
@pytest.mark.parametrize("folder", [HIGH, LOW])
def test_a_stop_in_either_expert_is_resumed_bit_for_bit(
    world: World,
    undisturbed: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    ask: Callable[[Path], None],
) -> None:
    stop_in(monkeypatch, tmp_path, folder, step=3, ask=ask)
    stopped = train_there(world, tmp_path)
    monkeypatch.undo()
    assert stopped.code == 75, stopped.err
    assert f"after step 3 of 4 of {folder}; the same command continues" in stopped.err
    assert RunDir(tmp_path).training(folder).complete_checkpoints()[-1] == 3
    assert RunDir(tmp_path).training(LOW).recipe.exists() == (folder == LOW)
    assert ran(train_there(world, tmp_path)) == {HIGH: folder == HIGH, LOW: True}
    assert RunDir(tmp_path).training(folder).complete_checkpoints() == [3, 4]
    assert_same(tmp_path, undisturbed.run_dir)


def stop_in(
    monkeypatch: pytest.MonkeyPatch,
    run_dir: Path,
    folder: str,
    *,
    step: int,
    ask: Callable[[Path], None],
) -> None:
    """Ask for a stop in the middle of a step of one expert."""
    one_step = loop.Loop.one_step

    def asked(self: loop.Loop, now: int) -> None:
        if (self._job.directory.root.name, now) == (folder, step):
            ask(run_dir)
        one_step(self, now)

    monkeypatch.setattr(loop.Loop, "one_step", asked)


@pytest.mark.parametrize("ask", [stop_file, terminate])
def test_a_stop_in_the_last_step_of_the_first_expert_does_not_begin_the_second(
    world: World,
    undisturbed: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[Path], None],
) -> None:
    # Without held-out losses there is nothing left to do after the last step.
    without = "train.heldout.every_steps=null"
    stop_in(monkeypatch, tmp_path, HIGH, step=4, ask=ask)
    stopped = train_there(world, tmp_path, without)
    monkeypatch.undo()
    assert stopped.code == 75, stopped.err
    assert not RunDir(tmp_path).stop.exists()
    assert RunDir(tmp_path).training(HIGH).complete_checkpoints() == [2, 4]
    low = RunDir(tmp_path).training(LOW)
    assert low.complete_checkpoints() == [] and losses_if_any(tmp_path, LOW) == []
    finished = identity(tmp_path, HIGH)
    assert ran(train_there(world, tmp_path, without)) == {HIGH: False, LOW: True}
    assert identity(tmp_path, HIGH) == finished
    for folder in (HIGH, LOW):
        assert losses(tmp_path, folder) == losses(undisturbed.run_dir, folder)


def test_a_finished_run_trains_nothing_and_more_steps_train_both(
    world: World, undisturbed: Trained, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed.run_dir, tmp_path, dirs_exist_ok=True)
    before = digests(tmp_path, "train/**/*.json*", "train/**/*.distcp")
    assert ran(train_there(world, tmp_path)) == {HIGH: False, LOW: False}
    assert digests(tmp_path, "train/**/*.json*", "train/**/*.distcp") == before
    assert ran(train_there(world, tmp_path, "train.steps=5")) == {HIGH: True, LOW: True}
    for folder in (HIGH, LOW):
        assert losses(tmp_path, folder)[:4] == losses(undisturbed.run_dir, folder)
        assert RunDir(tmp_path).training(folder).complete_checkpoints() == [4, 5]
