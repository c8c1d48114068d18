# SPDX-License-Identifier: Apache-2.0
"""Bytes on disk by hand."""

from pathlib import Path

import pytest

from fastvideo.config.architectures import release
from fastvideo.config.recipe import Recipe
from fastvideo.cost.disk import checkpoint_bytes, checkpoint_count, export_bytes, sample_bytes
from fastvideo.cost.transformer import parameters, trained_parameters

RECIPES = Path(__file__).parents[3] / "configs/recipes"


def recipe(name: str, *overrides: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml", overrides)


def test_a_checkpoint_is_weights_and_two_running_means() -> None:
    config = release("wan2.1_t2v_14b").transformer
    number = parameters(config, "wan2.1")
    assert checkpoint_bytes(recipe("wan2.1_t2v_14b_full"), config) == 12 * number
    small = recipe("wan2.1_t2v_14b_full", "train.optimizer.kind=adamw_8bit")
    assert checkpoint_bytes(small, config) == pytest.approx(6.03 * number, rel=2e-3)


def test_only_what_trains_is_saved_and_exported() -> None:
    config = release("wan2.1_t2v_1.3b").transformer
    number = 30 * 16 * (8 * (1536 + 1536) + 2 * (1536 + 8960))
    adapters = recipe("wan2.1_t2v_1.3b_lora", "train.method.rank=16")
    assert trained_parameters(adapters, config) == number
    assert checkpoint_bytes(adapters, config) == 12 * number
    assert export_bytes(adapters, config) == 4 * number
    averaged = recipe("wan2.1_t2v_1.3b_lora", "train.method.rank=16", "train.ema={}")
    assert checkpoint_bytes(averaged, config) == 16 * number
    norms = recipe("wan2.1_t2v_1.3b_lora", "train.method={kind: lora, rank: 16, norms: true}")
    assert trained_parameters(norms, config) == number + 30 * 6 * 1536
    full = recipe("wan2.1_t2v_1.3b_full", "train.ema={}")
    assert checkpoint_bytes(full, config) == 16 * parameters(config, "wan2.1")


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["train.steps=1000", "train.checkpoint.every_steps=100"], 3),
        (["train.steps=1000", "train.checkpoint.every_steps=600"], 2),
        (["train.steps=1000", "train.checkpoint.every_steps=1000"], 1),
        (["train.steps=1000", "train.checkpoint.keep_every=200"], 2),
        (
            [
                *("train.steps=1000", "train.checkpoint.every_steps=100"),
                *("train.checkpoint.keep_last=1", "train.checkpoint.keep_every=200"),
            ],
            7,
        ),
        (["train.steps=2000", "train.checkpoint.keep_every=200"], 4),
        (["train.steps=2000", "train.checkpoint.keep_every=300"], 4),
        (
            [
                *("train.steps=2000", "train.checkpoint.every_steps=200"),
                "train.checkpoint.keep_every=300",
            ],
            6,
        ),
        (
            [
                *("train.steps=2000", "train.checkpoint.every_minutes=30"),
                "train.checkpoint.keep_every=300",
            ],
            9,
        ),
        (["train.steps=10", "train.checkpoint.every_minutes=30"], 3),
    ],
)
def test_checkpoints_that_are_there_at_one_time(overrides: list[str], count: int) -> None:
    assert checkpoint_count(recipe("wan2.1_t2v_14b_full", *overrides)) == count


def test_an_export_has_the_dtype_asked_for() -> None:
    config = release("wan2.1_t2v_1.3b").transformer
    number = parameters(config, "wan2.1")
    assert export_bytes(recipe("wan2.1_t2v_1.3b_full"), config) == 4 * number
    half = recipe("wan2.1_t2v_1.3b_full", "export.dtype=bfloat16")
    assert export_bytes(half, config) == 2 * number


def test_a_lora_file_has_the_dtype_of_the_export() -> None:
    config = release("wan2.1_t2v_1.3b").transformer
    whole = recipe("wan2.1_t2v_1.3b_lora")
    number = trained_parameters(whole, config)
    assert export_bytes(whole, config) == 4 * number
    for dtype in ("bfloat16", "float16"):
        half = recipe("wan2.1_t2v_1.3b_lora", f"export.dtype={dtype}")
        assert export_bytes(half, config) == 2 * number


LATENT = 16 * 21 * 60 * 104
TEXT = 128 * 4096


@pytest.mark.parametrize(
    ("name", "config", "overrides", "expected"),
    [
        ("wan2.1_t2v_14b_full", "wan2.1_t2v_14b", [], 2 * LATENT + 2 * TEXT),
        (
            "wan2.1_t2v_14b_full",
            "wan2.1_t2v_14b",
            ["shards.dtype=float32"],
            4 * LATENT + 4 * TEXT,
        ),
        (
            "wan2.1_i2v_14b_full",
            "wan2.1_i2v_14b_480p",
            [],
            2 * (2 * LATENT + 257 * 1280) + 2 * TEXT,
        ),
        ("wan2.2_i2v_a14b_full", "wan2.2_i2v_a14b", [], 2 * 2 * LATENT + 2 * TEXT),
        (
            "hunyuan_t2v_full",
            "hunyuan_t2v",
            [],
            2 * 16 * 16 * 60 * 104 + 2 * (TEXT + 768),
        ),
    ],
)
def test_a_clip_in_a_shard(name: str, config: str, overrides: list[str], expected: int) -> None:
    assert sample_bytes(recipe(name, *overrides), release(config).transformer) == expected
