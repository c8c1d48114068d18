# SPDX-License-Identifier: Apache-2.0
"""The forward pass of Wan's transformer over diffusers' modules: entry, blocks, exit.

Equal to ``diffusers.WanTransformer3DModel.forward`` for the same parameters; written out so that
attention, sequence layout and fused operations can be exchanged.

Axes: B batch, C channels, T/Y/X latent frames, rows and columns, S tokens of the video, L tokens of
the text, D model dimension, H heads, K head dimension, M the six modulations of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvideo.models import attention

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine tables (1, S, 1, K)."""


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the tokens."""

    text_BLD: Tensor
    modulation_BMD: Tensor
    rotary: Rotary


def forward(
    model: WanTransformer3DModel,
    *,
    latents_BCTYX: Tensor,
    timestep_B: Tensor,
    text_BLD: Tensor,
    activation_checkpointing: bool = False,
) -> Tensor:
    """Predict the flow of noised latents.

    Args:
        model: Parameters and configuration.
        latents_BCTYX: Noised, normalised latents; T, Y, X divisible by the patch.
        timestep_B: sigma * 1000, float32.
        text_BLD: Text embedding, zero rows up to the length the model was trained with.
        activation_checkpointing: Keep only the input of each block for the backward pass.

    Returns:
        (B, C, T, Y, X).
    """
    tokens_BSD, condition, time_BD = entry(
        model, latents_BCTYX=latents_BCTYX, timestep_B=timestep_B, text_BLD=text_BLD
    )
    run: Callable[..., Tensor] = _checkpointed if activation_checkpointing else block
    for layer in model.blocks:
        tokens_BSD = run(layer, tokens_BSD, condition)
    return leave(model, tokens_BSD, time_BD, shape=latents_BCTYX.shape[2:])


def entry(
    model: WanTransformer3DModel, *, latents_BCTYX: Tensor, timestep_B: Tensor, text_BLD: Tensor
) -> tuple[Tensor, Conditioning, Tensor]:
    """Patchify and embed: tokens (B, S, D), what blocks are conditioned on, time (B, D)."""
    rotary = model.rope(latents_BCTYX)
    tokens_BSD = model.patch_embedding(latents_BCTYX).flatten(2).transpose(1, 2).contiguous()
    embed = model.condition_embedder
    # Pipelines keep the time embedding in float32; bfloat16 cannot tell step 987 from 988.
    with torch.autocast(timestep_B.device.type, enabled=False):
        time_dtype = embed.time_embedder.linear_1.weight.dtype
        time_BD = embed.time_embedder(embed.timesteps_proj(timestep_B).to(time_dtype))
    time_BD = time_BD.to(text_BLD.dtype)
    modulation_BMD = embed.time_proj(embed.act_fn(time_BD)).unflatten(1, (6, -1))
    condition = Conditioning(embed.text_embedder(text_BLD), modulation_BMD, rotary)
    return tokens_BSD, condition, time_BD


def block(layer: WanTransformerBlock, tokens_BSD: Tensor, condition: Conditioning) -> Tensor:
    """One transformer block; the residual stream keeps its dtype, sums are float32."""
    modulation = layer.scale_shift_table + condition.modulation_BMD.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=1)
    dtype = tokens_BSD.dtype

    normed = (layer.norm1(tokens_BSD.float()) * (1 + scale) + shift).to(dtype)
    attended = self_attention(layer.attn1, normed, condition.rotary)
    tokens_BSD = (tokens_BSD.float() + attended * gate).to(dtype)

    normed = layer.norm2(tokens_BSD.float()).to(dtype)
    tokens_BSD = tokens_BSD + cross_attention(layer.attn2, normed, condition.text_BLD)

    normed = (layer.norm3(tokens_BSD.float()) * (1 + ffn_scale) + ffn_shift).to(dtype)
    out: Tensor = tokens_BSD.float() + layer.ffn(normed).float() * ffn_gate
    return out.to(dtype)


def self_attention(layer: WanAttention, tokens_BSD: Tensor, rotary: Rotary) -> Tensor:
    """Attention of the video tokens to each other, with rotary positions."""
    q = _heads(layer, layer.norm_q(layer.to_q(tokens_BSD)))
    k = _heads(layer, layer.norm_k(layer.to_k(tokens_BSD)))
    v = _heads(layer, layer.to_v(tokens_BSD))
    return _out(layer, attention.dense(rotate(q, rotary), rotate(k, rotary), v))


def cross_attention(layer: WanAttention, tokens_BSD: Tensor, text_BLD: Tensor) -> Tensor:
    """Attention of the video tokens to the text; no mask, zero rows take part as in training."""
    q = _heads(layer, layer.norm_q(layer.to_q(tokens_BSD)))
    k = _heads(layer, layer.norm_k(layer.to_k(text_BLD)))
    v = _heads(layer, layer.to_v(text_BLD))
    return _out(layer, attention.dense(q, k, v))


def rotate(x_BSHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotate neighbouring pairs of channels by the position's angle (Su et al., 2021)."""
    cos, sin = (table[..., ::2] for table in rotary)
    even, odd = x_BSHK.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).to(x_BSHK.dtype)


def leave(
    model: WanTransformer3DModel, tokens_BSD: Tensor, time_BD: Tensor, *, shape: torch.Size
) -> Tensor:
    """Final norm and projection, back to (B, C, T, Y, X) of the latent ``shape`` (T, Y, X)."""
    shift, scale = (model.scale_shift_table + time_BD.unsqueeze(1)).chunk(2, dim=1)
    normed = (model.norm_out(tokens_BSD.float()) * (1 + scale) + shift).to(tokens_BSD.dtype)
    patch = model.config.patch_size
    grid = [size // step for size, step in zip(shape, patch, strict=True)]
    patches = model.proj_out(normed).unflatten(1, grid).unflatten(-1, (*patch, -1))
    # B t y x pt py px C -> B C (t pt) (y py) (x px)
    image: Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return image.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _checkpointed(
    layer: WanTransformerBlock, tokens_BSD: Tensor, condition: Conditioning
) -> Tensor:
    out = checkpoint(block, layer, tokens_BSD, condition, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out


def _heads(layer: WanAttention, x_BSD: Tensor) -> Tensor:
    split: Tensor = x_BSD.unflatten(2, (layer.heads, -1))
    return split


def _out(layer: WanAttention, x_BSHK: Tensor) -> Tensor:
    out: Tensor = layer.to_out[0](x_BSHK.flatten(2, 3))
    return out
