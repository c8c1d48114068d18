# SPDX-License-Identifier: Apache-2.0
"""Adapters in a transformer: what they add, what trains, and what is random."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from fastvideo.config.train import Lora
from fastvideo.models.adapters import (
    Dropout,
    adapter_tensors,
    add_adapters,
    base_names,
    draw_dropout,
    fill_adapters,
    hold_in,
    other_tensors,
)
from fastvideo.models.weights import materialise
from tests.tiny_models import build, inputs
from tests.tiny_world import PAIRS, WAN21, Pair

SHAPE = (2, 2, 4, 4)


def adapted(method: Lora, pair: Pair = WAN21) -> nn.Module:
    torch.manual_seed(0)
    model = build(pair)
    add_adapters(model, method)
    materialise(model, "cpu")
    fill_adapters(model, seed=1)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def output(model: nn.Module, pair: Pair = WAN21) -> Tensor:
    torch.manual_seed(1)
    out: Tensor = model(**inputs(pair, SHAPE), return_dict=False)[0]
    return out


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_new_adapters_change_nothing_and_only_they_train(pair: Pair) -> None:
    torch.manual_seed(0)
    plain = build(pair)
    model = adapted(Lora(rank=2, biases=True), pair)
    assert torch.equal(output(model, pair), output(plain, pair))
    assert all(".lora_" in name for name in trained(model))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert set(base_names(model.state_dict()).values()) == plain.state_dict().keys()
    assert not other_tensors(trained(model))


def test_names_are_those_of_files() -> None:
    model = adapted(Lora(rank=2, biases=True, norms=True, targets=(r"blocks\.0\.attn1\.to_q",)))
    assert set(adapter_tensors(trained(model))) == {
        f"blocks.0.attn1.to_q.{name}" for name in ("lora_A.weight", "lora_B.weight", "lora_B.bias")
    }
    norms = other_tensors(trained(model))
    plain = dict(build(WAN21).named_parameters())
    assert norms.keys() == {n for n in plain if n.startswith("blocks.") and ".norm" in n}


def test_alpha_counts_against_the_rank() -> None:
    outputs = []
    for alpha in (None, 2.0, 4.0):
        model = adapted(Lora(rank=2, alpha=alpha))
        for name, parameter in trained(model).items():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.01)
        outputs.append(output(model))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_numbers_are_a_function_of_seed_and_name() -> None:
    one, same, other = (adapted(Lora(rank=2)) for _ in range(3))
    fill_adapters(other, seed=2)
    first, again, different = (trained(model) for model in (one, same, other))
    downs = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in downs)
    assert not any(torch.equal(first[name], different[name]) for name in downs)
    shaped_alike = [first[name] for name in downs if first[name].shape == first[downs[0]].shape]
    assert len({tuple(t.flatten().tolist()) for t in shaped_alike}) == len(shaped_alike) > 1
    bound = first[downs[0]].shape[1] ** -0.5
    assert 0.8 * bound < first[downs[0]].abs().max() <= bound


def test_what_is_frozen_is_held_in_the_dtype_of_the_computation() -> None:
    model = adapted(Lora(rank=2))
    hold_in(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    half = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert "blocks.0.attn1.to_q.base_layer.weight" in half and "proj_out.bias" in half
    assert "patch_embedding.weight" in half and "condition_embedder.time_proj.weight" in half
    for name in dtypes.keys() - half:
        assert any(part in name for part in (".lora_", "norm", "table", "time_embedder")), name


def test_a_mask_is_of_a_sample_and_a_projection_and_of_nothing_else() -> None:
    model = adapted(Lora(rank=2, dropout=0.5))
    layers = [m for m in model.modules() if isinstance(m, Dropout)]

    def masks(*seeds: int) -> list[Tensor]:
        draw_dropout(model, seeds, device="cpu")
        return [found(layer) for layer in layers]

    def found(layer: Any) -> Tensor:
        mask: Tensor = layer.mask_BD
        return mask

    both, second = masks(7, 8), masks(8)
    for two, one in zip(both, second, strict=True):
        assert torch.equal(two[1], one[0])
        assert not torch.equal(two[0], two[1])
        assert set(two.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(both[0], both[1]), "projections differ"


def test_dropout_acts_on_all_tokens_alike_and_in_training_only() -> None:
    layer = Dropout("a", 0.5)
    x = torch.ones(2, 3, 8)
    assert layer(x) is x, "no mask yet"
    layer.mask_BD = torch.tensor([[0.0, 2.0] * 4, [2.0, 0.0] * 4])
    dropped = layer(x)
    assert torch.equal(dropped[:, 0], layer.mask_BD) and torch.equal(dropped[:, 0], dropped[:, 2])
    runs = layer(torch.ones(4, 8))  # two rows of each sample
    assert torch.equal(runs, layer.mask_BD.repeat_interleave(2, dim=0))
    assert layer.eval()(x) is x


def test_a_model_on_the_meta_device_gets_adapters_there() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, text_dim=8, ffn_dim=32, num_layers=1
        )
    add_adapters(model, Lora(rank=2))
    assert all(p.is_meta for p in trained(model).values())
