# SPDX-License-Identifier: Apache-2.0
"""What a run does: schedule, clipping, precision, resumes, stops and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo.config.train import Schedule
from fastvideo.errors import Stopped, UserError
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, read_checkpoint_marker
from fastvideo.train import loop
from fastvideo.train.launcher import train
from fastvideo.train.schedule import learning_rate_factor
from fastvideo.train.stop import StopRequest
from tests.records import exact
from tests.tiny_world import Done, World, fastvideo, in_fork, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    world = make_world(tmp_path_factory.mktemp("training"), clips=4, heldout=2, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


def run(world: World, run_dir: Path, *overrides: str, force: bool = False) -> list[dict[str, Any]]:
    """Train in a fork; the records."""
    recipe = world.load(f"run_dir={run_dir}", *overrides)
    assert in_fork(lambda: train(recipe, force=force)) == 0
    return records(run_dir)


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = RunDir(run_dir).training().metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in found if "loss" in record]


def state_of(run_dir: Path, step: int) -> dict[str, Any]:
    file = run_dir / f"{step}.pt"
    dcp_to_torch_save(RunDir(run_dir).training().checkpoint(step), file)
    saved: dict[str, Any] = torch.load(file)
    return saved


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_the_learning_rate_follows_the_schedule(world: World, tmp_path: Path) -> None:
    found = run(world, tmp_path, "train.schedule={kind: cosine, warmup_steps: 2}")
    schedule = Schedule(kind="cosine", warmup_steps=2)
    expected = [1e-3 * learning_rate_factor(step, schedule, steps=6) for step in range(6)]
    assert [r["lr"] for r in found if "lr" in r] == pytest.approx(expected)


def test_gradients_are_clipped_to_the_given_norm(world: World, tmp_path: Path) -> None:
    """AdamW's first moment after one step is 0.1 times the gradient it was given."""
    for name, limit in (("clipped", 0.01), ("free", 1e9)):
        found = run(
            world,
            tmp_path / name,
            f"train.max_grad_norm={limit}",
            "train.steps=1",
        )
        saved = state_of(tmp_path / name, 1)["optimizer"]
        moments = [tensor for key, tensor in saved.items() if key.endswith(".exp_avg")]
        norm = math.sqrt(sum(float(moment.square().sum()) for moment in moments)) * 10
        measured = next(r["grad_norm"] for r in found if "grad_norm" in r)
        assert measured > 0.1, "recorded before clipping"
        assert norm == pytest.approx(min(limit, measured), rel=1e-3)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(
    world: World, tmp_path: Path
) -> None:
    full = losses(run(world, tmp_path / "full"))
    half = losses(run(world, tmp_path / "half", "train.dtype=bfloat16"))
    assert half != full
    assert half == pytest.approx(full, rel=2e-2)
    saved = state_of(tmp_path / "half", 6)
    assert {tensor.dtype for tensor in saved["model"].values()} == {torch.float32}


def test_records_count_samples_and_epochs_and_mean_the_losses(world: World, tmp_path: Path) -> None:
    each = losses(run(world, tmp_path / "each"))
    found = run(world, tmp_path / "mean", "train.log_every_steps=3")
    assert losses(found) == [sum(each[:3]) / 3, sum(each[3:]) / 3]
    counted = [(r["step"], r["samples"], r["epoch"]) for r in found if "loss" in r]
    assert counted == [(3, 6, 1.5), (6, 12, 3.0)]


def test_held_out_losses_are_taken_at_the_quantiles(world: World, tmp_path: Path) -> None:
    """At the first step the model is the same whatever else: more quantiles hold the middle."""
    one = run(world, tmp_path / "1", "train.heldout.num_timesteps=1", "train.steps=1")[0]
    three = run(world, tmp_path / "3", "train.heldout.num_timesteps=3", "train.steps=1")[0]
    assert len(three["heldout_loss_by_quantile"]) == 3
    assert three["heldout_loss_by_quantile"][1] == one["heldout_loss"]
    assert len(set(three["heldout_loss_by_quantile"])) == 3
    assert three["heldout_loss"] == pytest.approx(sum(three["heldout_loss_by_quantile"]) / 3)


def test_measuring_the_held_out_loss_changes_nothing(world: World, tmp_path: Path) -> None:
    with_it = losses(run(world, tmp_path / "with"))
    without = run(world, tmp_path / "without", "train.heldout.every_steps=null")
    assert losses(without) == with_it
    assert not any("heldout_loss" in record for record in without)


def test_a_resumed_run_goes_on_between_two_records(world: World, tmp_path: Path) -> None:
    """Losses not recorded yet travel in the checkpoint."""
    often = ("train.log_every_steps=3", "train.checkpoint.every_steps=2")
    expected = run(world, tmp_path / "undisturbed", *often)
    recipe = world.load(f"run_dir={tmp_path / 'killed'}", *often)
    assert in_fork(lambda: train(recipe), fault="checkpoint.marker.done:2") == -9
    marker = read_checkpoint_marker(RunDir(tmp_path / "killed").training().checkpoint(4))
    assert marker is not None and len(marker["losses"]) == 1
    found = run(world, tmp_path / "killed", *often)
    assert losses(found) == losses(expected)
    assert [r["step"] for r in found] == [r["step"] for r in expected]


def test_samples_per_second_count_the_steps_of_this_process(world: World, tmp_path: Path) -> None:
    often = ("train.log_every_steps=6", "train.heldout.every_steps=null")
    slow = ("train.activation_checkpointing=full",)
    recipe = world.load(f"run_dir={tmp_path}", *often, "train.checkpoint.every_steps=5")
    assert in_fork(lambda: train(recipe), fault="checkpoint.marker.done:1") == -9
    (record,) = run(world, tmp_path, *often, *slow)
    (reference,) = run(world, tmp_path / "whole", *often, *slow)
    assert record["samples_per_s"] < 3 * reference["samples_per_s"]


def test_a_stop_before_the_first_step_changes_nothing(world: World, tmp_path: Path) -> None:
    expected = losses(run(world, tmp_path / "undisturbed"))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "STOP").touch()
    assert fastvideo("train", world, f"run_dir={stopped}").code == 75
    assert RunDir(stopped).training().complete_checkpoints() == []
    assert losses(run(world, stopped)) == expected
    assert same_weights(state_of(stopped, 6), state_of(tmp_path / "undisturbed", 6))


@pytest.mark.parametrize("at", [3, 6])
def test_a_stop_during_the_held_out_loss_is_measured_on_the_next_start(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    expected = run(world, tmp_path / "undisturbed")
    stopped = tmp_path / "stopped"
    measure = loop.Loop._measure_heldout

    def interrupt(self: loop.Loop, step: int) -> bool:
        if step == at:
            RunDir(stopped).stop.touch()
        return measure(self, step)

    monkeypatch.setattr(loop.Loop, "_measure_heldout", interrupt)
    assert fastvideo("train", world, f"run_dir={stopped}").code == 75
    monkeypatch.undo()
    marker = read_checkpoint_marker(RunDir(stopped).training().checkpoint(at))
    assert marker is not None and not marker["measured"]
    found = run(world, stopped)
    assert [exact(record) for record in found] == [exact(record) for record in expected]
    assert run(world, stopped) == records(stopped), "measured once"


def test_a_stop_after_the_last_step_is_no_stop(world: World, tmp_path: Path) -> None:
    recipe = world.load(
        f"run_dir={tmp_path}", "train.heldout.every_steps=null", "train.checkpoint.every_steps=6"
    )

    def stop_at_the_end() -> None:
        save = loop.Loop._save

        def save_and_ask(self: loop.Loop, step: int, **options: bool) -> None:
            save(self, step, **options)
            RunDir(tmp_path).stop.touch()

        loop.Loop._save = save_and_ask  # type: ignore[method-assign]
        train(recipe)

    assert in_fork(stop_at_the_end) == 0
    assert not RunDir(tmp_path).stop.exists()


def test_forced_settings_of_the_optimizer_take_effect(world: World, tmp_path: Path) -> None:
    run(world, tmp_path)
    decay = "train.optimizer.weight_decay=0.7"
    with pytest.raises(UserError, match=r"weight_decay: 0\.01 -> 0\.7"):
        train(world.load(f"run_dir={tmp_path}", decay, "train.steps=7"))
    run(world, tmp_path, decay, "train.steps=7", force=True)
    saved = state_of(tmp_path, 7)["optimizer"]
    assert {v for key, v in saved.items() if key.endswith(".weight_decay")} == {0.0, 0.7}


def test_other_clips_or_splits_under_a_run_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    world = make_world(tmp_path, clips=4, heldout=1, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    run(world, world.run_dir)
    items = world.items
    world.write_items([{**items[0], "split": "heldout"}, *items[1:]])
    assert in_fork(lambda: preprocess(world.load())) == 0
    for overrides in ((), ("train.steps=8",)):  # finished, and to be continued
        with pytest.raises(UserError, match="other clips, or other ones are held out"):
            train(world.load(*overrides))
    world.write_items(items)
    assert in_fork(lambda: preprocess(world.load())) == 0
    assert train(world.load())["trained"]["transformer"]["ran"] is False
    assert losses(run(world, world.run_dir, "train.steps=7"))


def test_a_second_trainer_in_the_same_run_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[Done] = []

    def second_trainer(self: StopRequest) -> str:
        if not codes:
            codes.append(fastvideo("train", world, f"run_dir={tmp_path}"))
        return "the test"

    monkeypatch.setattr(StopRequest, "reason", second_trainer)
    with pytest.raises(Stopped):
        train(world.load(f"run_dir={tmp_path}"))
    assert codes[0].code == 2 and "another process trains here" in codes[0].err


def test_losses_that_are_not_finite_are_left_out_and_too_many_of_them_end_the_run(
    world: World, tmp_path: Path
) -> None:
    bad = ("train.optimizer.lr=1e30", "train.watch.max_skipped_steps=2")
    done = fastvideo("train", world, f"run_dir={tmp_path}", *bad)
    assert done.code == 1 and "Traceback" not in done.err
    assert "step 2: loss" in done.err and "left out, 1 of at most 2 in a row" in done.err
    assert "not finite; clips: " in done.err
    assert "3 steps in a row, train.watch.max_skipped_steps is 2" in done.err
    assert all(s < 6 for s in RunDir(tmp_path).training().complete_checkpoints())
