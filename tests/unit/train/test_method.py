# SPDX-License-Identifier: Apache-2.0
"""What trains, and what the optimizer does with each parameter."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from fastvideo.config.train import AdamW, Full
from fastvideo.train.method import build_method, build_optimizer

SPEC = AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.5)


@pytest.fixture
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
    )
    for parameter in model.parameters():  # what is zero would not show decay
        torch.nn.init.normal_(parameter)
    return model


def test_full_finetuning_trains_every_parameter(model: WanTransformer3DModel) -> None:
    model.requires_grad_(False)
    build_method(Full()).prepare(model)
    optimizer = build_optimizer(model, SPEC)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained})
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_parameters_are_not_given_to_the_optimizer(model: WanTransformer3DModel) -> None:
    model.requires_grad_(False)
    model.proj_out.requires_grad_(True)
    groups = build_optimizer(model, SPEC).param_groups
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_settings_are_those_of_the_recipe(model: WanTransformer3DModel) -> None:
    for group in build_optimizer(model, SPEC).param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.1, (0.8, 0.95), 1e-6)


def test_weight_decay_shrinks_matrices_and_nothing_else(model: WanTransformer3DModel) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # decay alone is left
    build_optimizer(model, SPEC).step()
    kept = set()
    for name, parameter in model.named_parameters():
        if torch.equal(parameter, before[name]):
            kept.add(name)
        else:
            torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * 0.5))
    assert kept == {name for name in before if is_no_matrix(name)}
    assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.0.norm2.weight"} <= kept
    assert {"patch_embedding.weight", "blocks.0.ffn.net.2.weight"} <= before.keys() - kept


def is_no_matrix(name: str) -> bool:
    *_, module, kind = name.split(".") if "." in name else ("", name)
    return kind in ("bias", "scale_shift_table") or module.startswith("norm")
