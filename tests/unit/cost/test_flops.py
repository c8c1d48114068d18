# SPDX-License-Identifier: Apache-2.0
"""FLOPs against a formula by hand and torch's counter."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvideo.config.architectures import release
from fastvideo.config.recipe import Recipe
from fastvideo.cost.flops import (
    Flops,
    forward_flops,
    hardware_flops,
    tokens_per_sample,
    training_flops,
)
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers
from fastvideo.models import hunyuan_forward, wan_forward
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.tiny_models import build, inputs, tokens
from tests.tiny_world import PAIRS, Pair

RECIPES = Path(__file__).parents[3] / "configs/recipes"
SHAPE = (2, 3, 8, 12)
"""(B, T, Y, X) of latents."""
WITHOUT_GRADIENT = (
    *("patch_embedding", "x_embedder.proj", "context_embedder.proj_in"),
    *("text_embedder.linear_1", "time_embedder.linear_1"),
    *("timestep_embedder.linear_1", "guidance_embedder.linear_1"),
)
"""The first layers: what they are given has no gradient, so one product less in the backward."""


def recipe(name: str, *overrides: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml", overrides)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_they_are_what_torch_counts(pair: Pair) -> None:
    """With attention as matrix products: torch has no count of the CPU's fused kernel."""
    model, module = build(pair), hunyuan_forward if "hunyuan" in pair.family else wan_forward
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out: torch.Tensor = module.forward(model, **inputs(pair, SHAPE))
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    found = layers(TRANSFORMERS[pair.family, pair.task], pair.family, tokens(pair, SHAPE))
    linear = SHAPE[0] * sum(layer.flops for layer in found.linears)
    attention = SHAPE[0] * sum(layer.flops for layer in found.attentions)
    first = [layer.flops for layer in found.linears if layer.name.endswith(WITHOUT_GRADIENT)]

    counted = {str(name): n for name, n in forward.get_flop_counts()["Global"].items()}
    assert counted.pop("aten.bmm") == attention
    assert sum(counted.values()) == linear
    assert backward.get_total_flops() == 2 * (linear + attention) - SHAPE[0] * sum(first)


def test_wan_14b_at_480p_by_hand() -> None:
    s, text, d, f = 21 * 30 * 52, 512, 5120, 13824
    block = 6 * s * d * d + 2 * text * d * d + 2 * s * d * f
    ends = s * 64 * d + s * d * 64 + text * (4096 * d + d * d) + 256 * d + d * d + d * 6 * d
    linear = 2 * (40 * block + ends)
    attention = 40 * (4 * s * s * d + 4 * s * text * d)

    spec = recipe("wan2.1_t2v_14b_full")
    config = release("wan2.1_t2v_14b").transformer
    assert tokens_per_sample(spec, config) == s == 32760
    assert training_flops(spec, config) == Flops(3 * linear, 3 * attention)
    # The same count of others, see fastvideo.cost.duration: 6.18 PFLOP at 37,440 tokens.
    assert training_flops(spec, config).actual == pytest.approx(5.03e15, rel=2e-3)


def test_hunyuan_by_hand() -> None:
    s, text, d, f = 16 * 30 * 52, 256, 3072, 12288
    n = s + text
    double = 4 * n * d * d + 2 * n * d * f + 2 * 6 * d * d
    single = 3 * n * d * d + n * d * f + n * (d + f) * d + 3 * d * d
    refiner = 2 * (text * (4 * d * d + 2 * d * f) + 2 * d * d) + text * 4096 * d
    vectors = 3 * (256 * d + d * d) + 768 * d + d * d + 4096 * d + d * d + 2 * d * d
    linear = 2 * (20 * double + 40 * single + refiner + vectors + 2 * s * 64 * d)
    attention = 60 * 4 * n * n * d + 2 * 4 * text * text * d
    found = forward_flops(recipe("hunyuan_t2v_full"), release("hunyuan_t2v").transformer)
    assert found == Flops(linear, attention)


def test_what_is_computed_again_is_no_work_of_the_model() -> None:
    config = release("wan2.1_t2v_1.3b").transformer
    found = {
        policy: recipe("wan2.1_t2v_1.3b_full", f"train.activation_checkpointing={policy}")
        for policy in ("none", "selective", "full")
    }
    model = {training_flops(spec, config) for spec in found.values()}
    none, selective, full = (hardware_flops(spec, config) for spec in found.values())
    assert model == {none}
    to_the_text = 30 * 4 * 32760 * 512 * 1536
    assert selective.attention == none.attention + to_the_text < full.attention
    assert none.linear < selective.linear == full.linear
    assert full.actual / none.actual == pytest.approx(4 / 3, rel=0.01)


def test_skipped_attention_is_no_work_but_counts_as_dense() -> None:
    sparse = Flops(linear=10, attention=100, skipped=90)
    assert (sparse.actual, sparse.dense_equivalent) == (20, 110)
    assert sparse.times(3) == Flops(30, 300, 270)
    assert Flops(10, 100).actual == Flops(10, 100).dense_equivalent == 110


def test_frames_with_timesteps_of_their_own_are_runs() -> None:
    spec = recipe("wan2.2_ti2v_5b_full")
    config = release("wan2.2_ti2v_5b").transformer
    one = layers(config, "wan2.1", Tokens(video=tokens_per_sample(spec, config), text=512))
    more = forward_flops(spec, config).linear - sum(layer.flops for layer in one.linears)
    frames = (spec.clip.num_frames - 1) // 4 + 1
    wide = 24 * 128
    assert more == 2 * (frames - 1) * (256 * wide + wide * wide + wide * 6 * wide)
