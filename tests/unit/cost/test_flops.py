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
    training,
    training_flops,
)
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import FULL, layers
from fastvideo.cost.walk import gradients
from fastvideo.models import hunyuan_forward, wan_forward
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.tiny_models import build, inputs, tokens
from tests.tiny_world import PAIRS, Pair

RECIPES = Path(__file__).parents[3] / "configs/recipes"
SHAPE = (2, 3, 8, 12)
"""(B, T, Y, X) of latents."""


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
    config = TRANSFORMERS[pair.family, pair.task]
    found = layers(config, pair.family, tokens(pair, SHAPE))
    linear = SHAPE[0] * sum(layer.flops for layer in found.linears)
    attention = SHAPE[0] * sum(layer.flops for layer in found.attentions)
    both = SHAPE[0] * training(found, gradients(config, pair.family, FULL)).actual

    counted = {str(name): n for name, n in forward.get_flop_counts()["Global"].items()}
    assert counted.pop("aten.bmm") == attention
    assert sum(counted.values()) == linear
    assert forward.get_total_flops() + backward.get_total_flops() == both


def test_wan_14b_at_480p_by_hand() -> None:
    s, text, d, f = 21 * 30 * 52, 512, 5120, 13824
    block = 6 * s * d * d + 2 * text * d * d + 2 * s * d * f
    ends = s * 64 * d + s * d * 64 + text * (4096 * d + d * d) + 256 * d + d * d + d * 6 * d
    linear = 2 * (40 * block + ends)
    attention = 40 * (4 * s * s * d + 4 * s * text * d)

    first = 2 * (s * 64 * d + text * 4096 * d + 256 * d)  # whose inputs need no gradient

    spec = recipe("wan2.1_t2v_14b_full")
    config = release("wan2.1_t2v_14b").transformer
    assert tokens_per_sample(spec, config) == s == 32760
    assert training_flops(spec, config) == Flops(3 * linear - first, 3 * attention)
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
    assert sparse + sparse == Flops(20, 200, 180)
    assert Flops(10, 100).actual == Flops(10, 100).dense_equivalent == 110


def test_frames_with_timesteps_of_their_own_are_runs() -> None:
    spec = recipe("wan2.2_ti2v_5b_full")
    config = release("wan2.2_ti2v_5b").transformer
    one = layers(config, "wan2.1", Tokens(video=tokens_per_sample(spec, config), text=512))
    more = forward_flops(spec, config).linear - sum(layer.flops for layer in one.linears)
    frames = (spec.clip.num_frames - 1) // 4 + 1
    wide = 24 * 128
    assert more == 2 * (frames - 1) * (256 * wide + wide * wide + wide * 6 * wide)


def test_adapters_of_wan_14b_cost_two_thirds_of_a_full_finetune() -> None:
    """Frozen weights have no gradient; what comes before the first adapter has none at all."""
    s, text, d, f, r = 21 * 30 * 52, 512, 5120, 13824, 32
    video, words = 6 * s * d * d + 2 * s * d * f, 2 * text * d * d
    ends = s * 64 * d + text * (4096 * d + d * d) + 256 * d + d * d + d * 6 * d
    # Both matrices of an adapter, three times; but the text needs no gradient.
    adapters = 3 * 4 * r * (s * (7 * d + f) + text * 2 * d) - 2 * r * text * 2 * d
    first = 2 * 3 * s * d * (d + r)  # queries, keys and values of the first block
    linear = 40 * (2 * words + 4 * video + adapters) + 2 * ends + 4 * s * d * 64 - first
    found = training_flops(recipe("wan2.1_t2v_14b_lora"), release("wan2.1_t2v_14b").transformer)
    assert found == Flops(linear, 3 * 40 * (4 * s * s * d + 4 * s * text * d))
