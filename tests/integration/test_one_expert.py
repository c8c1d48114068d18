# SPDX-License-Identifier: Apache-2.0
"""Wan2.2 A14B: one expert a job, and what is refused of two."""

import json
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.experts_job import (
    ACCUMULATED,
    HIGH,
    LOW,
    Trained,
    assert_same,
    identity,
    losses_if_any,
    numbers,
    preprocessed,
    ran,
    train_there,
    train_undisturbed,
    weights,
)
from tests.tiny_world import Done, World, digests, fastvideo, start_fork, wait_for


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return preprocessed(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Trained:
    return train_undisturbed(world)


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
