# SPDX-License-Identifier: Apache-2.0
"""Whatever the layout, a training sees the same samples and noise and finds the same losses."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from tests.layouts_job import (
    Layout,
    Seen,
    distance,
    in_order,
    losses,
    records,
    train_in,
    weights,
)
from tests.tiny_world import PAIRS, Pair, World, in_fork, make_world

NOISE = 1e-5
"""What another order of float32 sums may change, relative."""
BATCH = 12
OPTIONS = (
    f"train.global_batch_size={BATCH}",
    "train.deterministic=true",
    "train.heldout.max_clips=3",
)
ONE = Layout()
DDP = Layout(replicate=2)
FSDP = Layout(shard=2)
HSDP = Layout(replicate=2, shard=2)
SP = Layout(replicate=2, sequence=2)
SP_FSDP = Layout(replicate=2, shard=2, sequence=2)
SP_WITHIN_FSDP = Layout(shard=4, sequence=2)
LAYOUTS = [DDP, FSDP, HSDP, SP, SP_FSDP, SP_WITHIN_FSDP, Layout(shard=3)]


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Seven clips to train on, which do not divide the batch, and three held out."""
    world = make_world(tmp_path_factory.mktemp("job"), clips=7, heldout=3, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@dataclass(frozen=True)
class Trained:
    """A training in one process, that others are compared with."""

    run_dir: Path
    seen: list[list[Seen]]


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Twenty steps in one process."""
    run_dir = tmp_path_factory.mktemp("one")
    return Trained(run_dir, train_in(world, run_dir, ONE, *options(steps=20)))


def options(*more: str, steps: int) -> tuple[str, ...]:
    return (*OPTIONS, f"train.steps={steps}", "train.checkpoint.every_steps=100", *more)


def assert_same_training(
    run_dir: Path, layout: Layout, seen: list[list[Seen]], one: Trained
) -> None:
    steps = max(losses(run_dir))
    assert in_order(seen, layout, batch=BATCH) == in_order(one.seen, ONE, batch=BATCH)[:steps]
    for first in range(0, len(seen), layout.sequence):
        together = seen[first : first + layout.sequence]
        assert all(samples == together[0] for samples in together), "they share the samples"
    expected = {step: loss for step, loss in losses(one.run_dir).items() if step <= steps}
    assert losses(run_dir) == pytest.approx(expected, rel=NOISE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_losses_and_samples_are_those_of_one_process(
    world: World, reference: Trained, tmp_path: Path, layout: Layout
) -> None:
    seen = train_in(world, tmp_path, layout, *options(steps=20))
    assert_same_training(tmp_path, layout, seen, reference)
    assert heldout(tmp_path) == pytest.approx(heldout(reference.run_dir), rel=NOISE)
    assert distance(weights(tmp_path, 20), weights(reference.run_dir, 20)) < 1e-3


@pytest.mark.parametrize("layout", [DDP, HSDP, SP_FSDP], ids=str)
def test_accumulation_changes_nothing(
    world: World, reference: Trained, tmp_path: Path, layout: Layout
) -> None:
    more = "train.micro_batch_size=1", "train.activation_checkpointing=selective"
    few = options(*more, "train.heldout.every_steps=null", steps=3)
    seen = train_in(world, tmp_path, layout, *few)
    assert_same_training(tmp_path, layout, seen, reference)


def heldout(run_dir: Path) -> list[float]:
    return [r["heldout_loss"] for r in records(run_dir) if "heldout_loss" in r]


@pytest.mark.parametrize("layout", [DDP, FSDP, SP_FSDP], ids=str)
def test_bfloat16_computes_the_same_in_every_layout(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    """What FSDP gathers in bfloat16 is what autocast casts elsewhere: sums differ, no more."""
    half = options("train.dtype=bfloat16", "train.heldout.every_steps=null", steps=3)
    train_in(world, tmp_path / "one", ONE, *half)
    train_in(world, tmp_path / "many", layout, *half)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert losses(tmp_path / "one")[1] == pytest.approx(losses(tmp_path / "many")[1], rel=1e-6)


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ("parallel.reduce_dtype=bfloat16", DDP),
        ("parallel.reduce_dtype=bfloat16", HSDP),
        ("parallel.cpu_offload=true", FSDP),
        ("parallel.cpu_offload=true", ONE),
    ],
)
def test_other_ways_to_hold_and_sum_are_near(
    world: World, reference: Trained, tmp_path: Path, key: str, layout: Layout
) -> None:
    train_in(world, tmp_path, layout, *options(key, "train.heldout.every_steps=null", steps=3))
    near = 1e-3 if "reduce" in key else NOISE
    expected = losses(reference.run_dir)
    assert losses(tmp_path) == pytest.approx({n: expected[n] for n in (1, 2, 3)}, rel=near)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if str(pair) != "wan2.1-t2v"], ids=str)
def test_every_model_trains_in_shards_and_in_shared_samples(tmp_path: Path, pair: Pair) -> None:
    model = tmp_path / "model"
    write_tiny(model, family=pair.family, task=pair.task)
    world = make_world(tmp_path / "job", clips=4, model=model, pair=pair)
    more = ("train.expert=low",) if "a14b" in pair.family else ()
    assert in_fork(lambda: preprocess(world.load())) == 0
    for layout in (ONE, SP_FSDP, DDP):
        few = options("train.heldout.every_steps=null", *more, steps=2)
        train_in(world, tmp_path / str(layout), layout, *few, "train.global_batch_size=4")
    for layout in (SP_FSDP, DDP):
        assert losses(tmp_path / str(layout)) == pytest.approx(losses(tmp_path / "one"), rel=NOISE)
