# SPDX-License-Identifier: Apache-2.0
"""Adapters and averages are the same whatever the layout, in every process, and after restarts."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastvideo.checkpoint import Saved
from fastvideo.models import adapters
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.train import worker
from tests.layouts_job import Layout, distance, losses, same, stored, train_in, weights, work_of
from tests.ranks import in_ranks
from tests.tiny_world import PAIRS, Pair, World, in_fork, make_world

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
    for part in ("model", "average"):
        found, expected = (stored(run, 8)[part] for run in (tmp_path, one))
        assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("layout", [Layout(replicate=2), Layout(replicate=4)], ids=str)
def test_every_process_has_the_same_adapters(world: World, tmp_path: Path, layout: Layout) -> None:
    first, *others = adapters_in(world, tmp_path, layout, *OPTIONS, "train.steps=4")
    assert any(name.endswith("lora_B.default.bias") for name in first)
    assert all(tensor.any() for tensor in first.values()), "all of them trained"
    assert all(same(first, other) for other in others)


def adapters_in(
    world: World, run_dir: Path, layout: Layout, *overrides: str
) -> list[dict[str, Tensor]]:
    """Train; what each process holds at the end of it."""
    work = work_of(world, run_dir, layout, overrides)

    def train(rank: int) -> dict[str, Tensor]:
        built: list[Saved] = []
        build = worker.empty_state

        def remembered(*given: Any, **named: Any) -> Saved:
            built.append(build(*given, **named))
            return built[0]

        worker.empty_state = remembered
        work(rank)
        model = built[0].model
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    return in_ranks(layout.processes, train, join=False)


@pytest.mark.parametrize("layout", [ONE, Layout(shard=2), Layout(replicate=2)], ids=str)
def test_a_restart_goes_on_bit_for_bit(world: World, tmp_path: Path, layout: Layout) -> None:
    """With the masks of dropout, which micro-batches and recomputation do not change either."""
    train_in(world, tmp_path / "whole", layout, *OPTIONS, "train.steps=4")
    for until in (1, 4):
        train_in(world, tmp_path / "parts", layout, *OPTIONS, f"train.steps={until}")
    assert same(weights(tmp_path / "parts", 4), weights(tmp_path / "whole", 4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_micro_batches_and_recomputation_change_nothing(
    world: World, one: Path, tmp_path: Path
) -> None:
    for number, recompute in enumerate(("selective", "full")):
        more = ("train.micro_batch_size=1", f"train.activation_checkpointing={recompute}")
        run_dir = tmp_path / str(number)
        train_in(world, run_dir, ONE, *OPTIONS, "train.steps=3", *more)
        expected = {step: loss for step, loss in losses(one).items() if step <= 3}
        assert losses(run_dir) == pytest.approx(expected, rel=NOISE)


def test_a_checkpoint_holds_what_trains_and_nothing_else(one: Path) -> None:
    names = set(stored(one, 8)["model"])
    assert names == set(stored(one, 8)["average"])
    adapters = {name for name in names if ".lora_" in name}
    assert len(adapters) == 2 * 10 * 3, "A, B and its bias of ten projections in two blocks"
    assert all("norm" in name for name in names - adapters)


@pytest.mark.parametrize("layout", [Layout(replicate=2), Layout(shard=2)], ids=str)
def test_a_base_held_in_bfloat16_computes_what_autocast_casts(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    half = (*OPTIONS, "train.dtype=bfloat16", "train.steps=2", "train.heldout.every_steps=null")
    kept = tmp_path / "kept"
    train_in(world, kept, ONE, *half)
    hold_in = adapters.hold_in
    adapters.hold_in = lambda model, dtype: None  # float32, which autocast casts each time
    try:
        train_in(world, tmp_path / "cast", ONE, *half)
    finally:
        adapters.hold_in = hold_in
    assert same(weights(kept, 2), weights(tmp_path / "cast", 2)), "bit for bit"
    train_in(world, tmp_path / "many", layout, *half)
    assert losses(tmp_path / "many") == pytest.approx(losses(kept), rel=1e-4)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if str(pair) != "wan2.1-t2v"], ids=str)
def test_every_model_trains_adapters_in_shards_and_in_shared_samples(
    tmp_path: Path, pair: Pair
) -> None:
    model = tmp_path / "model"
    write_tiny(model, family=pair.family, task=pair.task)
    world = make_world(tmp_path / "job", clips=4, model=model, pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    more = ("train.expert=low",) if "a14b" in pair.family else ()
    few = (*OPTIONS, "train.heldout.every_steps=null", "train.steps=2", *more)
    layouts = (ONE, Layout(replicate=2, shard=2, sequence=2))
    for layout in layouts:
        train_in(world, tmp_path / str(layout), layout, *few)
    found = [losses(tmp_path / str(layout)) for layout in layouts]
    assert found[1] == pytest.approx(found[0], rel=NOISE)
