# SPDX-License-Identifier: Apache-2.0
"""What trains, and with which settings."""

import torch
from diffusers import WanTransformer3DModel

from fastvideo.config.train import AdamW, Full
from fastvideo.train.method import build_method, build_optimizer


def model() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=8, ffn_dim=32, num_layers=1
    )


def test_a_full_finetune_trains_every_weight() -> None:
    transformer = model().requires_grad_(False)
    build_method(Full()).prepare(transformer)
    assert all(p.requires_grad for p in transformer.parameters())


def test_weight_decay_is_for_matrices_only() -> None:
    transformer = model()
    spec = AdamW(lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(transformer, spec)
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == set(names.values())
    assert decay["blocks.0.attn1.to_q.weight"] == decay["patch_embedding.weight"] == 0.3
    for name in (
        "blocks.0.attn1.to_q.bias",
        "blocks.0.attn1.norm_q.weight",
        "blocks.0.scale_shift_table",
        "scale_shift_table",
        "blocks.0.norm2.weight",
    ):
        assert decay[name] == 0.0, name
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.95), 1e-6)


def test_what_is_frozen_is_not_optimized() -> None:
    transformer = model().requires_grad_(False)
    transformer.proj_out.weight.requires_grad_(True)
    optimizer = build_optimizer(transformer, AdamW())
    (parameter,) = (p for group in optimizer.param_groups for p in group["params"])
    assert parameter is transformer.proj_out.weight
    assert isinstance(optimizer, torch.optim.AdamW)
