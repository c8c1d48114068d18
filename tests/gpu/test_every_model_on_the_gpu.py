# SPDX-License-Identifier: Apache-2.0
"""Every model on a GPU: encoders, training in float32 and bfloat16, sampling with offloading.

``make test ARGS=tests/gpu`` on a machine with a CUDA build of torch.
"""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastvideo.config.recipe import Recipe
from fastvideo.data.loader import Samples
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.models.family import find_family
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, ShardStore
from fastvideo.train.launcher import train
from tests.tiny_world import PAIRS, Pair, World, make_world

DEVICE = "cuda"


@pytest.fixture(params=PAIRS, ids=str)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    pair: Pair = request.param
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    return make_world(tmp_path, clips=4, heldout=1, model=tmp_path / "model", pair=pair)


def on(world: World, device: str, *overrides: str) -> Recipe:
    """The recipe with everything on one device, in folders of that device."""
    verbs = ("preprocess", "train", "generate")
    return world.load(
        f"run_dir={world.root / device}",
        f"shards.path={world.root / f'shards-{device}'}",
        *(f"{verb}.device={device}" for verb in verbs),
        *overrides,
    )


def samples(recipe: Recipe) -> Samples:
    columns = find_family(recipe).columns(Path(recipe.model.path))
    return Samples(ShardStore(recipe.shards.path), split="train", columns=columns)


def losses(recipe: Recipe) -> list[float]:
    found = []
    for transformer in recipe.architecture.transformers:
        lines = RunDir(recipe.run_dir).training(transformer).metrics.read_text().splitlines()
        found += [r["loss"] for r in map(json.loads, lines) if "loss" in r]
    return found


def frames(video: str) -> npt.NDArray[np.int16]:
    with av.open(video) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(decoded).astype(np.int16)


def test_the_gpu_gives_what_the_cpu_gives(world: World) -> None:
    recipes = {device: on(world, device) for device in ("cpu", DEVICE)}
    for recipe in recipes.values():
        preprocess(recipe)
        train(recipe)
        export(recipe)
    cpu, gpu = (samples(recipe) for recipe in recipes.values())
    for index in range(len(cpu)):
        a, b = cpu[index], gpu[index]
        assert a.id == b.id
        pairs: list[tuple[Any, Any]] = [(a.vae_latent, b.vae_latent)]
        pairs += [(a.images[name], b.images[name]) for name in a.images]
        pairs += [(x.embedding, y.embedding) for x, y in zip(a.texts, b.texts, strict=True)]
        for x, y in pairs:
            torch.testing.assert_close(y.float(), x.float(), rtol=5e-3, atol=5e-3)
    assert losses(recipes[DEVICE]) == pytest.approx(losses(recipes["cpu"]), rel=5e-3)


def test_bfloat16_trains_near_float32(world: World) -> None:
    recipe = on(world, DEVICE)
    preprocess(recipe)
    train(recipe)
    half = on(world, DEVICE, f"run_dir={world.root / 'half'}", "train.dtype=bfloat16")
    train(half)
    assert losses(half) == pytest.approx(losses(recipe), rel=5e-2)


def test_offloading_changes_no_video(world: World) -> None:
    videos = []
    for offload in ("none", "model", "sequential"):
        where = f"run_dir={world.root / offload}"
        how = (where, "generate.weights=base", f"generate.offload={offload}")
        videos.append(frames(generate(on(world, DEVICE, *how))["videos"][0]))
    for video in videos[1:]:
        assert np.abs(video - videos[0]).mean() < 1
