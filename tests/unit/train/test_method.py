# SPDX-License-Identifier: Apache-2.0
"""What trains."""

from diffusers import WanTransformer3DModel

from fastvideo.config.train import Train
from fastvideo.train.method import build_method


def test_a_full_finetune_trains_every_weight() -> None:
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=8, ffn_dim=32, num_layers=1
    ).requires_grad_(False)
    build_method(Train()).prepare(transformer)
    assert all(p.requires_grad for p in transformer.parameters())
