# SPDX-License-Identifier: Apache-2.0
"""Wan2.2 A14B: two trainings in a run, alone or one after the other.

Axes: N timesteps.
"""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo.config.recipe import Recipe
from fastvideo.models.family import Batch
from fastvideo.models.tiny import write_tiny
from fastvideo.models.wan22_a14b import Wan22A14B
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, read_checkpoint_marker
from fastvideo.train import loop, worker
from fastvideo.train.launcher import train
from tests.tiny_world import (
    Done,
    Pair,
    World,
    digests,
    fastvideo,
    in_fork,
    make_world,
    passes,
    start_fork,
    wait_for,
)

HIGH, LOW = "transformer", "transformer_2"
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
DENSITIES = ("uniform", "logit_normal", "mode")
SHIFTS = (1.0, 3.0, 12.0)
ACCUMULATED = ("train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=2")
"""Four optimizer steps of two micro-batches each; checkpoints after 2 and 4."""
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Preprocessed jobs by task."""
    return {task: world_of(task, tmp_path_factory.mktemp(task)) for task in BOUNDARIES}


def world_of(task: str, root: Path) -> World:
    write_tiny(root / "model", family="wan2.2-a14b", task=task)
    pair = Pair("wan2.2-a14b", task)
    world = make_world(root, clips=3, heldout=1, model=root / "model", pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture
def world(worlds: dict[str, World]) -> World:
    return worlds["t2v"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of both experts that nothing disturbed."""

    run_dir: Path
    fault_points: list[str]
    timesteps: dict[str, list[float]]
    """Those that the transformers were called with, by expert, held-out ones included."""


@pytest.fixture(scope="module")
def undisturbed(worlds: dict[str, World]) -> Trained:
    world = worlds["t2v"]
    run_dir, log = world.root / "undisturbed", world.root / "faults.log"
    seen = world.root / "timesteps.jsonl"
    recipe = world.load(f"run_dir={run_dir}", *ACCUMULATED)

    def watched() -> None:
        arguments = Wan22A14B.arguments
        training = worker.train

        def noted(self: Any, batch: Batch) -> dict[str, torch.Tensor]:
            given = arguments(self, batch)
            with open(seen, "a", encoding="utf-8") as lines:
                lines.write(json.dumps([expert[-1], given["timestep"].tolist()]) + "\n")
            return given

        expert: list[str] = []

        def told(recipe: Recipe, **rest: Any) -> None:
            expert.append(rest["transformer"])
            training(recipe, **rest)

        # of this forked process only
        Wan22A14B.arguments = noted  # type: ignore[method-assign]
        worker.train = told
        train(recipe)

    assert in_fork(watched, fault_log=log) == 0
    found: dict[str, list[float]] = {HIGH: [], LOW: []}
    for expert, timesteps in map(json.loads, seen.read_text().splitlines()):
        found[expert] += timesteps
    return Trained(run_dir, passes(log), found)


# ---------------------------------------------------------------- two trainings in a run


def on_its_side(timestep_N: torch.Tensor, folder: str, boundary: float) -> bool:
    """As the pipeline chooses an expert, step by step."""
    assert timestep_N.dtype == torch.float32
    is_high = [bool(t >= boundary * 1000) for t in timestep_N]
    return all(is_high) if folder == HIGH else not any(is_high)


def test_transformers_are_called_with_timesteps_of_their_interval(undisturbed: Trained) -> None:
    for folder, timesteps in undisturbed.timesteps.items():
        assert len(timesteps) == 4 * 4 + 3 * 2, "4 samples a step; held out at 0, 3 and 4"
        assert on_its_side(torch.tensor(timesteps), folder, 0.875)


def records(run_dir: Path, folder: str) -> list[dict[str, Any]]:
    """Metrics of one expert without times."""
    timed = ("samples_per_s", "data_wait_share", "memory_gib")
    lines = RunDir(run_dir).training(folder).metrics.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def losses(run_dir: Path, folder: str) -> list[float]:
    return [record["loss"] for record in records(run_dir, folder) if "loss" in record]


def numbers(run_dir: Path, folder: str, step: int = 4) -> dict[str, Any]:
    """Every number of a checkpoint: weights and optimizer."""
    file = run_dir / f"{folder}.pt"
    dcp_to_torch_save(RunDir(run_dir).training(folder).checkpoint(step), file)
    return dict(flat(torch.load(file)))


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from flat(value, f"{prefix}/{name}")
    else:
        yield prefix, tree


def assert_same(run_dir: Path, expected: Path, *, folders: Sequence[str] = (HIGH, LOW)) -> None:
    """Equal records and, bit for bit, equal numbers."""
    for folder in folders:
        assert records(run_dir, folder) == records(expected, folder), folder
        found, wanted = numbers(run_dir, folder), numbers(expected, folder)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert equal(found[name], value), f"{folder}{name}"


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def identity(run_dir: Path, folder: str) -> str:
    """A checkpoint has a new one whenever it is written."""
    marker = read_checkpoint_marker(RunDir(run_dir).training(folder).checkpoint(4))
    assert marker is not None
    return str(marker["id"])


def train_there(world: World, run_dir: Path, *overrides: str) -> Done:
    return fastvideo("train", world, f"run_dir={run_dir}", *ACCUMULATED, *overrides, "--json")


def ran(done: Done) -> dict[str, bool]:
    """Which experts a command trained."""
    assert done.code == 0, done.err
    return {name: about["ran"] for name, about in json.loads(done.out)["trained"].items()}


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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


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
    one_step = loop._one_step

    def asked(job: loop.Job, now: int, *rest: Any) -> None:
        if (job.directory.root.name, now) == (folder, step):
            ask(run_dir)
        one_step(job, now, *rest)

    monkeypatch.setattr(loop, "_one_step", asked)


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


def losses_if_any(run_dir: Path, folder: str) -> list[float]:
    return losses(run_dir, folder) if RunDir(run_dir).training(folder).metrics.exists() else []


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


# ---------------------------------------------------------------- one expert a job


def test_a_stop_file_stops_both_jobs_of_a_run(world: World, tmp_path: Path) -> None:
    """Side by side, as two jobs; the last one to stop takes the file away."""
    long = ("train.steps=100000", "train.checkpoint.every_steps=100000")
    where = (f"run_dir={tmp_path}", "train.heldout.every_steps=null", *long)
    recipes = [world.load(*where, f"train.expert={expert}") for expert in ("high", "low")]
    children = [start_fork(partial(train, recipe), environment={}) for recipe in recipes]
    try:
        for folder in (HIGH, LOW):
            while not losses_if_any(tmp_path, folder):
                time.sleep(0.05)
    finally:
        (tmp_path / "STOP").touch()
    for child in children:
        assert wait_for(child) == 1, "Stopped, outside of the command line"
    assert not (tmp_path / "STOP").exists()
    for folder in (HIGH, LOW):
        assert len(RunDir(tmp_path).training(folder).complete_checkpoints()) == 1


def test_jobs_of_two_experts_have_recipes_of_their_own(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert len({run_dir.resolved(expert) for expert in ("high", "low", None)}) == 3


@pytest.mark.parametrize(("first", "folder"), [("low", LOW), ("high", HIGH)])
def test_one_expert_alone_is_the_same_training_and_the_other_can_follow(
    world: World, undisturbed: Trained, tmp_path: Path, first: str, folder: str
) -> None:
    (other,) = {HIGH, LOW} - {folder}
    model = Path(world.load().model.path)
    before = digests(model, "**/*")
    assert ran(train_there(world, tmp_path, f"train.expert={first}")) == {folder: True}
    assert_same(tmp_path, undisturbed.run_dir, folders=(folder,))
    assert not RunDir(tmp_path).training(other).root.exists()
    finished = identity(tmp_path, folder)

    exported = export(world, tmp_path)
    assert json.loads(exported.out)["steps"] == {folder: 4}
    assert f"{other} was not trained in this run and stays the base model's" in exported.err
    assert f"{folder} was not trained" not in exported.err
    assert_exported(tmp_path, model, trained=(folder,))
    for kind in ("export", "checkpoint"):
        assert generate(world, tmp_path, kind) == 2
    assert same_videos(tmp_path)

    assert ran(train_there(world, tmp_path)) == {folder: False, other: True}
    assert identity(tmp_path, folder) == finished
    assert_same(tmp_path, undisturbed.run_dir)
    both = export(world, tmp_path)
    assert json.loads(both.out) == {
        "path": str(RunDir(tmp_path).export),
        "steps": {HIGH: 4, LOW: 4},
        "ran": True,
    }
    assert "was not trained" not in both.err
    assert_exported(tmp_path, model, trained=(HIGH, LOW))
    for kind in ("export", "checkpoint"):
        assert generate(world, tmp_path, kind) == 2, "of the other weights now"
    assert same_videos(tmp_path)
    assert digests(model, "**/*") == before, "the base model is as it was"


def export(world: World, run_dir: Path) -> Done:
    done = fastvideo("export", world, f"run_dir={run_dir}", *ACCUMULATED, "--json")
    assert done.code == 0, done.err
    return done


def generate(world: World, run_dir: Path, kind: str) -> int:
    guided = ("generate.guidance_scale=3", "generate.guidance_scale_2=2.0")
    overrides = (f"generate.weights={kind}", *guided)
    done = fastvideo("generate", world, f"run_dir={run_dir}", *overrides, "--json")
    assert done.code == 0, done.err
    return int(json.loads(done.out)["made"])


def same_videos(run_dir: Path) -> bool:
    one, other = (digests(RunDir(run_dir).generated(k), "*.mp4") for k in ("export", "checkpoint"))
    return one == other and len(one) == 2


def assert_exported(run_dir: Path, base: Path, *, trained: tuple[str, ...]) -> None:
    folder = RunDir(run_dir).export
    for name in (HIGH, LOW):
        found = weights(folder / name)
        if name in trained:
            saved = numbers(run_dir, name)
            wanted = {key: saved[f"/model/{key}"] for key in found}
        else:
            wanted = weights(base / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), name
    card = (folder / "README.md").read_text()
    for name in (HIGH, LOW):
        assert (f"| `{name}` | 4 | 16 |" in card) == (name in trained)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875


# ---------------------------------------------------------------- what is refused


def other_model(world: World, folder: Path) -> Path:
    shutil.copytree(world.load().model.path, folder)
    return folder


@pytest.mark.parametrize("steps", [4, 6])
def test_another_boundary_in_the_base_model_is_refused(
    world: World, undisturbed: Trained, tmp_path: Path, steps: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed.run_dir, run_dir)
    before = digests(run_dir, "**/*")
    index = other_model(world, tmp_path / "model") / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "boundary_ratio": 0.5}))
    overrides = (f"model.path={index.parent}", f"train.steps={steps}")
    for expert in ("null", "high", "low"):
        done = train_there(world, run_dir, *overrides, f"train.expert={expert}")
        assert done.code == 2, done.err
        for word in ("boundary_ratio", str(run_dir), "another run_dir"):
            assert word in done.err
    for verb in ("export", "generate"):
        where = (f"run_dir={run_dir}", "generate.weights=checkpoint", *overrides)
        done = fastvideo(verb, world, *where)
        assert done.code == 2 and "boundary_ratio is another" in done.err, done.err
    assert digests(run_dir, "**/*") == before


@pytest.mark.parametrize("what", ["config", "experts"])
def test_a_mistake_in_the_second_expert_is_said_before_the_first_one_trains(
    world: World, undisturbed: Trained, tmp_path: Path, what: str
) -> None:
    run_dir, overrides, word = tmp_path / "run", [], "transformer_2/config.json"
    if what == "config":
        model = other_model(world, tmp_path / "model")
        shutil.rmtree(model / LOW)
        overrides = [f"model.path={model}"]
    else:  # what is left of another run's second expert, with other settings
        shutil.copytree(undisturbed.run_dir / "train" / LOW, run_dir / "train" / LOW)
        overrides, word = ["train.optimizer.lr=1e-4"], "train.optimizer.lr: 0.001 -> 0.0001"
    done = train_there(world, run_dir, *overrides)
    assert done.code == 2 and word in done.err, done.err
    assert not RunDir(run_dir).training(HIGH).metrics.exists()
    assert not RunDir(run_dir).training(HIGH).recipe.exists()
