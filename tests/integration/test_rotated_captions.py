# SPDX-License-Identifier: Apache-2.0
"""A finetune learns which clip a caption means, a LoRA on top of it learns to mean another."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fastvideo.config.recipe import Recipe
from fastvideo.data.decode import decode_clip
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.preprocess import preprocess
from fastvideo.train.launcher import train
from tests.tiny_world import World, in_fork, make_world

CLIPS = 4
COMMON = (
    "train.global_batch_size=4",
    "train.text_dropout=0",
    "train.checkpoint.every_steps=1000",
    "train.heldout.every_steps=null",
    "train.log_every_steps=100",
    "train.tensorboard=false",
    "train.optimizer.weight_decay=0",
    "generate.num_inference_steps=10",
)
FULL = ("train.steps=400", "train.optimizer.lr=2e-3")
LORA = (
    "train.steps=250",
    "train.optimizer.lr=1e-2",
    "train.method={kind: lora, rank: 16, alpha: 32}",
)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("job"), clips=CLIPS, model=tiny_model)


def captions(world: World) -> list[str]:
    return [item["cap"][0] for item in world.items]


def assignment(recipe: Recipe, world: World) -> list[int]:
    """The clip that the video of each prompt is nearest to."""
    videos = [pixels(Path(video)) for video in generate(recipe)["videos"]]
    clips = [pixels(world.root / f"clips/videos/{i}.mp4") for i in range(CLIPS)]
    return [int(np.argmin([np.square(v - c).mean() for c in clips])) for v in videos]


def pixels(path: Path) -> npt.NDArray[np.float64]:
    return decode_clip(path, num_frames=9, height=32, width=48, fps=8).astype(np.float64)


def with_captions(world: World, found: Sequence[str]) -> None:
    items = [{**item, "cap": [text]} for item, text in zip(world.items, found, strict=True)]
    world.write_items(items)


def test_a_lora_on_rotated_captions_rotates_the_clips(world: World) -> None:
    original = captions(world)
    (world.root / "prompts.json").write_text(json.dumps(original))
    full = world.load(*COMMON, *FULL)

    def verbs(recipe: Recipe) -> None:
        for verb in (preprocess, train, export):
            verb(recipe)

    assert in_fork(lambda: verbs(full)) == 0
    assert assignment(full, world) == [0, 1, 2, 3]
    with_captions(world, [original[-1], *original[:-1]])
    root = world.root
    paths = (f"model.path={root}/run/export", f"shards.path={root}/rotated", f"run_dir={root}/lora")
    options = (*COMMON, *LORA, *paths)
    lora = world.load(*options)
    assert in_fork(lambda: verbs(lora)) == 0
    for weights in ("checkpoint", "export"):
        recipe = world.load(*options, f"generate.weights={weights}")
        assert assignment(recipe, world) == [1, 2, 3, 0], weights
