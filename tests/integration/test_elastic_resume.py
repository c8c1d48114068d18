# SPDX-License-Identifier: Apache-2.0
"""A run goes on with other numbers of processes: the same samples and noise, none lost or twice."""

from collections import Counter
from pathlib import Path

import pytest

from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from tests.layouts_job import Layout, Seen, in_order, losses, same, train_in, weights
from tests.tiny_world import World, in_fork, make_world

BATCH, CLIPS = 12, 8
EPOCHS = 3
STEPS = EPOCHS * CLIPS // BATCH * 4
"""Twelve steps: 144 samples, eighteen epochs of eight clips."""
OPTIONS = (
    f"train.global_batch_size={BATCH}",
    "train.deterministic=true",
    "train.checkpoint.keep_last=100",
    "train.heldout.every_steps=null",
)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("job"), clips=CLIPS, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


def test_four_processes_then_one_two_three_and_four_again(world: World, tmp_path: Path) -> None:
    plan = [
        (Layout(replicate=2, shard=2), 2),
        (Layout(), 4),
        (Layout(shard=2), 6),
        (Layout(replicate=3), 8),
        (Layout(replicate=2, shard=2, sequence=2), 10),
        (Layout(replicate=2, shard=2), 12),
    ]
    seen: list[list[Seen]] = []
    for layout, until in plan:
        found = train_in(
            world,
            tmp_path / "elastic",
            layout,
            *OPTIONS,
            f"train.steps={until}",
            "train.checkpoint.every_steps=2",
        )
        seen += in_order(found, layout, batch=BATCH)
    undisturbed = train_in(world, tmp_path / "one", Layout(), *OPTIONS, "train.steps=12")
    assert seen == in_order(undisturbed, Layout(), batch=BATCH)
    counted = Counter((one.epoch, one.index) for step in seen for one in step)
    epochs = len(seen) * BATCH // CLIPS
    assert epochs >= EPOCHS
    assert counted == {(epoch, index): 1 for epoch in range(epochs) for index in range(CLIPS)}
    assert losses(tmp_path / "elastic") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    "layout",
    [Layout(replicate=3), Layout(replicate=2, shard=2), Layout(shard=2, sequence=2)],
    ids=str,
)
def test_the_same_layout_goes_on_bit_for_bit(world: World, tmp_path: Path, layout: Layout) -> None:
    whole = (*OPTIONS, "train.steps=6", "train.loader_workers=2")
    train_in(world, tmp_path / "whole", layout, *whole, "train.checkpoint.every_steps=100")
    for until in (1, 3, 6):
        options = (*OPTIONS, f"train.steps={until}", "train.checkpoint.every_steps=2")
        train_in(world, tmp_path / "parts", layout, *options)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "parts", 6), weights(tmp_path / "whole", 6))
    assert RunDir(tmp_path / "parts").training().complete_checkpoints() == [1, 2, 3, 4, 6]
