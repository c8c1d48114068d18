# SPDX-License-Identifier: Apache-2.0
"""Adapters and averages are the same whatever the layout, in every process, and after restarts."""

from pathlib import Path

import pytest

from fastvideo.preprocess import preprocess
from tests.layouts_job import Layout, distance, losses, train_in, weights
from tests.tiny_world import World, in_fork, make_world

NOISE = 1e-5
"""What another order of float32 sums may change, relative."""
OPTIONS = (
    "train.method={kind: lora, rank: 3, alpha: 6, dropout: 0.2, biases: true, norms: true}",
    "train.ema={decay: 0.9}",
    "train.optimizer.lr=1e-2",
    "train.global_batch_size=4",
    "train.deterministic=true",
    "train.heldout.max_clips=1",
    "train.checkpoint.every_steps=100",
)
ONE = Layout()
LAYOUTS = [
    Layout(replicate=2),
    Layout(shard=2),
    Layout(replicate=2, shard=2),
    Layout(replicate=2, sequence=2),
    Layout(replicate=2, shard=2, sequence=2),
]


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("job"), clips=5, heldout=1, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture(scope="module")
def one(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps in one process."""
    run_dir = tmp_path_factory.mktemp("one")
    train_in(world, run_dir, ONE, *OPTIONS, "train.steps=8")
    return run_dir


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adapters_are_those_of_one_process(
    world: World, one: Path, tmp_path: Path, layout: Layout
) -> None:
    train_in(world, tmp_path, layout, *OPTIONS, "train.steps=8")
    assert losses(tmp_path) == pytest.approx(losses(one), rel=NOISE)
    assert distance(weights(tmp_path, 8), weights(one, 8)) < 1e-3
