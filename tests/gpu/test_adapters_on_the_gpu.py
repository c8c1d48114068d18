# SPDX-License-Identifier: Apache-2.0
"""Adapters on a GPU: they train near the CPU's numbers, and every way to offload samples them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvideo import sampled
from fastvideo.export import export
from fastvideo.generate import denoise
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.tiny_world import World, make_world

DEVICE = "cuda"
LORA = (
    "train.method={kind: lora, rank: 4, alpha: 8, dropout: 0.1, norms: true}",
    "train.ema={decay: 0.5}",
    "train.optimizer.lr=1e-2",
    "train.steps=4",
    "train.heldout.every_steps=null",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("job")
    write_tiny(root / "model")
    world = make_world(root, clips=4, model=root / "model")
    preprocess(world.load("preprocess.device=cpu"))
    return world


def losses(world: World, run_dir: Path, *overrides: str) -> list[float]:
    recipe = world.load(f"run_dir={run_dir}", *LORA, *overrides)
    train(recipe)
    lines = RunDir(run_dir).training().metrics.read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("more", [(), ("train.activation_checkpointing=full",)], ids=str)
def test_the_gpu_trains_what_the_cpu_trains(
    world: World, tmp_path: Path, more: tuple[str, ...]
) -> None:
    cpu = losses(world, tmp_path / "cpu", "train.device=cpu")
    gpu = losses(world, tmp_path / "gpu", f"train.device={DEVICE}", *more)
    assert gpu == pytest.approx(cpu, rel=5e-3)
    half = losses(world, tmp_path / "half", f"train.device={DEVICE}", "train.dtype=bfloat16")
    assert half == pytest.approx(cpu, rel=5e-2)


def test_offloading_changes_no_video(world: World, tmp_path: Path) -> None:
    losses(world, tmp_path, f"train.device={DEVICE}")
    recipe = world.load(f"run_dir={tmp_path}", *LORA)
    export(recipe)
    size = {"num_frames": 9, "height": 32, "width": 48}
    about = {**size, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0}
    videos: list[Any] = []
    for weights in ("export", "checkpoint"):
        for offload in ("none", "model", "sequential"):
            how = (f"generate.weights={weights}", f"generate.offload={offload}")
            asked = world.load(f"run_dir={tmp_path}", *LORA, f"generate.device={DEVICE}", *how)
            pipeline = sampled.load(asked, sampled.find(asked))
            videos.append(denoise(pipeline, about, prompt="a red square"))
    for video in videos[1:]:
        assert np.abs(video - videos[0]).max() < 1e-3
