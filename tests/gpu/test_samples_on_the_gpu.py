# SPDX-License-Identifier: Apache-2.0
"""Videos sampled while training on a GPU in bfloat16, and the memory that they give back.

``make test ARGS=tests/gpu`` on a machine with a CUDA build of torch.
"""

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastvideo.config.recipe import Recipe
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train import loop
from fastvideo.train.launcher import train
from tests.tiny_world import PAIRS, Pair, make_world

DEVICE = "cuda"


@pytest.fixture(params=PAIRS, ids=str)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """Sampled before and after four steps, as `generate` samples."""
    pair: Pair = request.param
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    world = make_world(tmp_path, clips=4, model=tmp_path / "model", pair=pair)
    guidance = "6" if pair.family == "hunyuan-video" else "2"
    recipe = world.load(
        *(f"{verb}.device={DEVICE}" for verb in ("preprocess", "train", "generate")),
        *(f"{verb}.dtype=bfloat16" for verb in ("train", "generate")),
        f"generate.guidance_scale={guidance}",
        "train.steps=4",
        "train.samples={}",
    )
    preprocess(recipe)
    return recipe


def frames(video: str | Path) -> npt.NDArray[np.int16]:
    with av.open(str(video)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(decoded).astype(np.int16)


def test_samples_are_near_the_videos_of_the_exported_model(recipe: Recipe) -> None:
    """Near: training keeps float32 weights, and computes with them by autocast."""
    train(recipe)
    export(recipe)
    *_, trained = recipe.architecture.transformers
    folder = RunDir(recipe.run_dir).training(trained).sampled(4)
    for video in map(Path, generate(recipe)["videos"]):
        assert np.abs(frames(folder / video.name) - frames(video)).mean() < 8, "of 255"


def test_sampling_gives_back_its_memory(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[int, int]] = []
    sample = loop.Loop._sample

    def measured(self: loop.Loop, step: int) -> bool:
        before = torch.cuda.memory_allocated()
        done = sample(self, step)
        held.append((before, torch.cuda.memory_allocated()))
        return done

    monkeypatch.setattr(loop.Loop, "_sample", measured)
    train(recipe)
    for before, after in held:
        assert after <= before + 2**20, "blocks of the scheduler and the like"
