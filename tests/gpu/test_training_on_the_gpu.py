# SPDX-License-Identifier: Apache-2.0
"""Training on a GPU: every way to run the blocks finds the same losses, and memory is as planned.

``make test ARGS=tests/gpu`` on a machine with a CUDA build of torch.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.config.recipe import Recipe
from fastvideo.cost.memory import memory
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.tiny_world import World, make_world

OPTIONS = ("train.device=cuda", "train.dtype=bfloat16", "train.steps=6")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("job")
    write_tiny(root / "model")
    world = make_world(root, clips=4, heldout=1, model=root / "model")
    preprocess(world.load("preprocess.device=cuda"))
    return world


def records(recipe: Recipe) -> list[dict[str, Any]]:
    lines = RunDir(recipe.run_dir).training().metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(world: World, run_dir: Path, *overrides: str) -> list[float]:
    recipe = world.load(f"run_dir={run_dir}", *OPTIONS, *overrides)
    train(recipe)
    return [record["loss"] for record in records(recipe) if "loss" in record]


@pytest.mark.parametrize(
    "way",
    [
        "train.activation_checkpointing=selective",
        "train.activation_checkpointing=full",
        "train.compile=true",
        "parallel.cpu_offload=true",
        "train.checkpoint.asynchronous=false",
        "train.optimizer.kind=adamw_8bit",
    ],
)
def test_every_way_to_run_finds_the_same_losses(world: World, tmp_path: Path, way: str) -> None:
    plain, other = losses(world, tmp_path / "plain"), losses(world, tmp_path / "other", way)
    assert other == pytest.approx(plain, rel=2e-2 if "8bit" in way else 5e-3)


def test_selective_recomputation_keeps_attention(world: World, tmp_path: Path) -> None:
    """With deterministic kernels recomputation changes no bit."""
    exact = "train.deterministic=true"
    plain = losses(world, tmp_path / "plain", exact)
    for way in ("selective", "full"):
        chosen = f"train.activation_checkpointing={way}"
        assert losses(world, tmp_path / way, exact, chosen) == plain


def test_records_name_the_share_of_the_peak_and_where_the_time_goes(
    world: World, tmp_path: Path
) -> None:
    recipe = world.load(f"run_dir={tmp_path}", *OPTIONS)
    train(recipe)
    found = [record for record in records(recipe) if "loss" in record][-1]
    assert 0 < found["mfu"] < 1
    for phase in ("data_s", "forward_s", "backward_s", "optimizer_s"):
        assert 0 < found[phase] <= found["step_s"]


def test_weights_gradients_and_optimizer_take_what_the_plan_says(
    world: World, tmp_path: Path
) -> None:
    recipe = world.load(f"run_dir={tmp_path}", *OPTIONS)
    config = json.loads((Path(recipe.model.path) / "transformer/config.json").read_text())
    torch.cuda.reset_peak_memory_stats()
    train(recipe)
    planned = memory(recipe, config, processes=1, shard=1).parts()
    held = sum(planned[part] for part in ("weights", "gradients", "optimizer"))
    assert torch.cuda.max_memory_allocated() > 0.9 * held
