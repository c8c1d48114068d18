# SPDX-License-Identifier: Apache-2.0
"""What a clip is conditioned on, from the file to the stored tensors, and who may train on it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvideo import hashing, state
from fastvideo.data.first_image import first_image
from fastvideo.data.shard import Contents, Row, read_texts, shard_schema, text_tensors, write_shard
from fastvideo.errors import UserError
from fastvideo.export import export
from fastvideo.models.family import Text
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import encoding_settings, preprocess
from fastvideo.state import ShardStore
from fastvideo.train.launcher import train
from tests.tiny_world import Pair, World, in_fork, make_world

RIGHT_IS_TOP = 6
"""EXIF orientation of a camera that was turned: what is stored as the top is the right side."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Wan2.1 image-to-video, preprocessed; tests change copies of its model."""
    root = tmp_path_factory.mktemp("conditions")
    write_tiny(root / "model", task="i2v")
    world = make_world(root, clips=1, model=root / "model", pair=Pair(task="i2v"))
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture
def model(world: World, tmp_path: Path) -> Path:
    """A copy of the model to change."""
    return Path(shutil.copytree(world.load().model.path, tmp_path / "model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def stored(world: World, *, text: bool) -> dict[str, str]:
    """Dtype of each tensor of the first clip."""
    marker = state.read_marker(ShardStore(world.shards).shard(0))
    assert marker is not None
    tensors = marker["rows"][0]["tensors"].items()
    return {name: about["dtype"] for name, about in tensors if ("text" in name) == text}


# ---------------------------------------------------------------- pictures and texts


def test_a_first_image_stands_as_its_exif_orientation_says(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = RIGHT_IS_TOP
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = first_image(tmp_path / "a.png", height=32, width=32)
    assert found[16, 28, 0] > 200
    assert found[16, 3, 0] < 50


def test_every_caption_keeps_its_own_pooled_text(tmp_path: Path) -> None:
    lengths = (2, 1, 3)
    texts = [Text(torch.full((n, 4), float(n)), torch.full((3,), 10.0 * n)) for n in lengths]
    values = {
        "id": "a",
        "file_name": "a.mp4",
        "caption": "two",
        "media_type": "video",
        "width": 8,
        "height": 8,
        "num_frames": 1,
        "duration_sec": 1.0,
        "fps": 8.0,
        "more_text_lengths": lengths[1:],
        "more_captions": ["one", "three"],
    }
    row = Row({"vae_latent": torch.zeros(1, 1, 1, 1), **text_tensors(texts)}, values)
    path = tmp_path / "shard.parquet"
    schema = shard_schema(["vae_latent", "text_embedding", "pooled_text_embedding"])
    write_shard(path, [row], schema=schema, contents=Contents("f", {}), point="shard")
    marker = state.read_marker(path)
    assert marker is not None
    for found, given in zip(read_texts(path, marker["rows"][0]), texts, strict=True):
        assert found.pooled is not None and given.pooled is not None
        assert torch.equal(found.embedding, given.embedding)
        assert torch.equal(found.pooled, given.pooled)


def test_latents_and_clip_features_are_stored_in_the_dtype_of_the_shards(world: World) -> None:
    """The text keeps that of its encoder."""
    assert stored(world, text=False) == dict.fromkeys(
        ("vae_latent", "clip_feature", "first_frame_latent"), "float16"
    )
    assert stored(world, text=True) == {"text_embedding": "float32"}


# ---------------------------------------------------------------- another model


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("image_encoder/config.json", {"hidden_act": "relu"}),
        ("image_processor/preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
        ("image_encoder/model.safetensors", None),
    ],
)
def test_another_image_encoder_is_another_setting_of_the_shards(
    world: World, model: Path, tmp_path: Path, file: str, change: dict[str, Any] | None
) -> None:
    def settings() -> Any:
        recipe = world.load(f"model.path={model}")
        return encoding_settings(recipe, hashes=hashing.HashCache(tmp_path / "hashes.json"))

    before = settings()
    if change is None:
        (model / file).write_bytes((model / file).read_bytes() + b" ")
    else:
        edit(model / file, **change)
    assert settings()["encoders"] != before["encoders"]


def test_shards_of_another_image_encoder_are_not_trained_on(
    world: World, model: Path, tmp_path: Path
) -> None:
    edit(model / "image_encoder/config.json", hidden_act="relu")
    with pytest.raises(UserError, match="another image encoder"):
        train(world.load(f"model.path={model}", f"run_dir={tmp_path / 'run'}"))


def test_what_was_trained_without_an_image_is_not_exported_for_images(tmp_path: Path) -> None:
    """TI2V-5B does both with the same folder and the same shards."""
    write_tiny(tmp_path / "model", family="wan2.2-ti2v-5b")
    pair = Pair("wan2.2-ti2v-5b", width=64)
    world = make_world(tmp_path, clips=2, model=tmp_path / "model", pair=pair)

    def prepare() -> None:
        preprocess(world.load())
        train(world.load("train.steps=1"))

    assert in_fork(prepare) == 0
    # without prompts, which have no first images here
    with pytest.raises(UserError, match=r"model\.task is another"):
        export(world.load("train.steps=1", "model.task=i2v", "validation.prompts=null"))
