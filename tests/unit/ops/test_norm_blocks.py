# SPDX-License-Identifier: Apache-2.0
"""Fused norms in the place of what diffusers' blocks do: same outputs, same gradients."""

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn

from fastvideo.models import attention
from fastvideo.models.attention import Rotary
from fastvideo.models.tiny_configs import TRANSFORMERS
from fastvideo.ops import norm
from tests.gradients import distances, gradients, relative

BATCH, FRAMES, PER_FRAME, HEADS, HEAD = 2, 3, 10, 2, 16
TOKENS, DIM = FRAMES * PER_FRAME, HEADS * HEAD


def fused_block(
    layer: WanTransformerBlock, tokens: Tensor, text: Tensor, modulation: Tensor, rotary: Rotary
) -> Tensor:
    """A block of Wan with every norm fused; modulation (B, G, 6, D)."""
    vectors = (layer.scale_shift_table + modulation).unbind(2)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = vectors
    affine = {"weight": layer.norm2.weight, "bias": layer.norm2.bias}
    eps = layer.norm1.eps

    normed = norm.layer_norm(tokens, scale=scale, shift=shift, eps=eps)
    attended = fused_attention(layer.attn1, normed, normed, rotary)
    tokens, normed = norm.residual_gate_layer_norm(tokens, attended, gate, **affine, eps=eps)
    attended = fused_attention(layer.attn2, normed, text, None)
    tokens, normed = norm.residual_gate_layer_norm(
        tokens, attended, scale=ffn_scale, shift=ffn_shift, eps=eps
    )
    out: Tensor = norm.residual_gate(tokens, layer.ffn(normed), ffn_gate)
    return out


def fused_attention(
    layer: WanAttention, x: Tensor, source: Tensor, rotary: Rotary | None
) -> Tensor:
    q, k = (
        normed_heads(of, projected, rotary)
        for of, projected in ((layer.norm_q, layer.to_q(x)), (layer.norm_k, layer.to_k(source)))
    )
    v = layer.to_v(source).unflatten(2, (HEADS, HEAD))
    out: Tensor = layer.to_out[0](attention.dense(q, k, v).flatten(2))
    return out


def normed_heads(layer: nn.RMSNorm, x: Tensor, rotary: Rotary | None) -> Tensor:
    assert layer.eps is not None
    if rotary is None:
        out: Tensor = norm.rms_norm(x, layer.weight, layer.eps).unflatten(2, (HEADS, HEAD))
        return out
    heads = x.unflatten(2, (HEADS, HEAD))
    return norm.rms_norm_rotary(heads, layer.weight, *rotary, eps=layer.eps, across_heads=True)


def per_token(modulation: Tensor) -> Tensor:
    """What diffusers is given: (B, 6, D), or one for each token where frames differ."""
    if modulation.shape[1] == 1:
        return modulation.squeeze(1)
    return modulation.repeat_interleave(PER_FRAME, dim=1)


@pytest.mark.parametrize("num_runs", [1, FRAMES])
def test_a_block_of_wan_is_that_of_diffusers(num_runs: int) -> None:
    torch.manual_seed(0)
    layer = WanTransformerBlock(DIM, 64, HEADS, cross_attn_norm=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    angles = torch.randn(1, TOKENS, 1, HEAD // 2).repeat_interleave(2, dim=3)
    given = {
        "tokens": torch.randn(BATCH, TOKENS, DIM),
        "text": torch.randn(BATCH, 7, DIM),
        "modulation": torch.randn(BATCH, num_runs, 6, DIM),
    }
    rotary = angles.cos(), angles.sin()

    def ours(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return fused_block(model, **given, rotary=rotary)

    def theirs(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        out: Tensor = model(given["tokens"], given["text"], per_token(given["modulation"]), rotary)
        return out

    assert relative(ours(layer, given), theirs(layer, given)) < 1e-5
    found = gradients(ours, layer, given, fixed=())
    expected = gradients(theirs, layer, given, fixed=())
    assert max(distances(found, expected).values()) < 1e-5


def test_heads_of_hunyuan_video_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**TRANSFORMERS["hunyuan-video", "t2v"])
    layer = model.transformer_blocks[0].attn.norm_q
    nn.init.normal_(layer.weight)
    cos, sin = model.rope(torch.randn(1, 16, 3, 8, 8))
    head, num_tokens = layer.weight.shape[0], cos.shape[0]
    given = {"x": torch.randn(BATCH, num_tokens, HEADS, head)}

    def ours(layer: Any, given: dict[str, Tensor]) -> Tensor:
        out: Tensor = norm.rms_norm_rotary(
            given["x"], layer.weight, cos, sin, eps=layer.eps, across_heads=False
        )
        return out

    def theirs(layer: nn.Module, given: dict[str, Tensor]) -> Tensor:
        out: Tensor = apply_rotary_emb(layer(given["x"]), (cos, sin), sequence_dim=1)
        return out

    assert relative(ours(layer, given), theirs(layer, given)) < 1e-5
    found, expected = (gradients(run, layer, given, fixed=()) for run in (ours, theirs))
    assert max(distances(found, expected).values()) < 1e-5
