# SPDX-License-Identifier: Apache-2.0
"""The average of what trains: what it is, that it goes on after a restart, and who uses it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastvideo.config.train import Ema
from fastvideo.errors import UserError
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.average import decay_at
from fastvideo.train.launcher import train
from tests.layouts_job import Layout, records, same, stored, train_in, weights
from tests.tiny_world import World, fastvideo, in_fork, make_world

ONE, FSDP = Layout(), Layout(replicate=2, shard=2)
EMA = "train.ema={decay: 0.8}"
EVERY = ("train.checkpoint.every_steps=1", "train.checkpoint.keep_last=10", "train.steps=4")


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("job"), clips=4, heldout=1, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load("train.global_batch_size=4"))) == 0
    return world


@pytest.fixture(scope="module")
def run_dir(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process, each of them saved."""
    folder = tmp_path_factory.mktemp("run")
    options = (EMA, "train.global_batch_size=4", *EVERY)
    assert in_fork(lambda: train(world.load(f"run_dir={folder}", *options))) == 0
    return folder


def average(run_dir: Path, step: int) -> dict[str, Tensor]:
    return stored(run_dir, step)["average"]


def heldout(run_dir: Path) -> list[float]:
    return [r["heldout_loss"] for r in records(run_dir) if "heldout_loss" in r]


def test_it_is_the_average_of_all_steps(world: World, run_dir: Path) -> None:
    (file,) = (Path(world.load().model.path) / "transformer").glob("*.safetensors")
    expected = {name: tensor.double() for name, tensor in load_file(file).items()}
    for step in range(1, 5):
        decay = min(0.8, (1 + step) / (10 + step))
        for name, tensor in weights(run_dir, step).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
        found = average(run_dir, step)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7)


def test_without_warm_up_its_decay_is_the_same_from_the_first_step() -> None:
    assert decay_at(Ema(decay=0.9, warmup=False), step=1) == 0.9
    assert decay_at(Ema(decay=0.9), step=1) == 2 / 11
    assert decay_at(Ema(decay=0.9), step=1000) == 0.9


@pytest.mark.parametrize("layout", [ONE, FSDP], ids=str)
def test_a_restarted_run_has_the_same_average_bit_for_bit(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    options = (EMA, "train.global_batch_size=4", "train.deterministic=true")
    train_in(world, tmp_path / "whole", layout, *options, "train.steps=4")
    for until in (1, 4):
        train_in(world, tmp_path / "parts", layout, *options, f"train.steps={until}")
    assert same(average(tmp_path / "parts", 4), average(tmp_path / "whole", 4))
    assert same(weights(tmp_path / "parts", 4), weights(tmp_path / "whole", 4))


def test_measuring_it_changes_nothing_of_the_training(world: World, tmp_path: Path) -> None:
    """Nor does FSDP train on with what it gathered to measure."""
    options = ("train.global_batch_size=4", "train.heldout.every_steps=1", "train.steps=4")
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    train_in(world, plain, FSDP, *options)
    train_in(world, averaged, FSDP, *options, EMA)
    assert same(weights(plain, 4), weights(averaged, 4))


def test_held_out_losses_are_those_of_the_average(world: World, tmp_path: Path) -> None:
    options = ("train.global_batch_size=4", "train.heldout.every_steps=2", "train.steps=4")
    found = {}
    for name, ema in (("none", ()), ("0", ("{decay: 0}",)), ("1", ("{decay: 0.9999999999}",))):
        run_dir = tmp_path / name
        more = (*(f"train.ema={table}" for table in ema), "train.ema.warmup=false")[: 2 * len(ema)]
        recipe = world.load(f"run_dir={run_dir}", *options, *more)
        assert in_fork(partial(train, recipe)) == 0
        found[name] = heldout(run_dir)
    assert found["0"] == found["none"], "an average of the last step only"
    assert found["none"][0] != found["none"][-1]
    assert found["1"] == pytest.approx([found["none"][0]] * 3, rel=1e-5), "it stays at the start"


def test_an_export_may_carry_it(world: World, run_dir: Path, tmp_path: Path) -> None:
    options = (EMA, "train.global_batch_size=4", *EVERY)
    done = fastvideo("export", world, f"run_dir={run_dir}", *options, "--ema", "--json")
    assert json.loads(done.out)["ran"], done.err
    assert not export(world.load(f"run_dir={run_dir}", *options))["ran"], "it is the default"
    (file,) = (RunDir(run_dir).export / "transformer").glob("*.safetensors")
    assert same(load_file(file), average(run_dir, 4))
    assert not same(load_file(file), weights(run_dir, 4))
    assert "averaged weights" in (RunDir(run_dir).export / "README.md").read_text()
    last = world.load(f"run_dir={run_dir}", *options, "export.ema=false")
    assert export(last)["ran"], "another choice is another export"
    assert same(load_file(file), weights(run_dir, 4))


def test_checkpoints_are_sampled_as_they_are_exported(
    world: World, run_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    videos = {}
    for ema in ("true", "false"):
        options = (f"run_dir={tmp_path}/run", EMA, *EVERY, f"export.ema={ema}")
        recipe = world.load("train.global_batch_size=4", *options)
        assert export(recipe)["ran"]
        for kind in ("export", "checkpoint"):
            asked = world.load("train.global_batch_size=4", *options, f"generate.weights={kind}")
            made = generate(asked)
            assert made["made"] == 2
            videos[ema, kind] = Path(made["videos"][0]).read_bytes()
    assert videos["true", "export"] == videos["true", "checkpoint"]
    assert videos["false", "export"] == videos["false", "checkpoint"]
    assert videos["true", "export"] != videos["false", "export"]


def test_an_average_that_a_checkpoint_lacks_is_refused_or_done_without(
    world: World, tmp_path: Path
) -> None:
    """As of an expert that was trained before the recipe asked for one."""
    run = (f"run_dir={tmp_path}", "train.global_batch_size=4", "train.steps=1")
    assert in_fork(lambda: train(world.load(*run))) == 0
    with pytest.raises(UserError, match=r"export\.ema=True: transformer was trained without"):
        export(world.load(*run, EMA, "export.ema=true"))
    assert export(world.load(*run, EMA))["ran"]
    (file,) = (RunDir(tmp_path).export / "transformer").glob("*.safetensors")
    assert same(load_file(file), weights(tmp_path, 1))


def test_an_average_asked_for_later_begins_with_the_weights(world: World, tmp_path: Path) -> None:
    run = (f"run_dir={tmp_path}", "train.global_batch_size=4")
    assert in_fork(lambda: train(world.load(*run, "train.steps=2"))) == 0
    ema = "train.ema={decay: 0.9999999999, warmup: false}"
    assert in_fork(lambda: train(world.load(*run, ema, "train.steps=3"), force=True)) == 0
    before, found = weights(tmp_path, 2), average(tmp_path, 3)
    for name, tensor in before.items():
        torch.testing.assert_close(found[name], tensor)
