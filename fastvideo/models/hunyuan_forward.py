# SPDX-License-Identifier: Apache-2.0
"""The forward pass of HunyuanVideo's transformer over diffusers' modules: entry, blocks, exit.

Equal to ``diffusers.HunyuanVideoTransformer3DModel.forward`` of the text-to-video model for the
same parameters and arguments; written out so that attention, sequence layout and fused operations
can be exchanged.

Axes: B batch, C channels, T/Y/X latent frames, rows and columns, S tokens of the video, L tokens of
the text (those of this process, where it shares samples with others), N = S + L the video and then
the text, D model dimension, H heads, K head dimension.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn

from fastvideo.models import attention, execution
from fastvideo.models.execution import Block, Execution
from fastvideo.models.sequence import SequenceParallel, frames_of

Streams = tuple[Tensor, Tensor]
"""Tokens of the video (B, S, D) and of the text (B, L, D)."""


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the two streams; ``time`` holds guidance and pooled text too."""

    time_BD: Tensor
    mask_B11N: Tensor
    """Of all tokens, in the order of the processes that share them."""
    rotary: attention.Rotary
    sizes: list[int]
    """Number of video and text tokens of each process."""
    sequence: SequenceParallel | None


@dataclass(frozen=True)
class Modulation:
    """How the timestep changes the tokens before an operation (shift, scale) and after it."""

    shift_B1D: Tensor
    scale_B1D: Tensor
    gate_B1D: Tensor


@dataclass(frozen=True)
class Projections:
    """Normalised queries and keys, and values, without positions; (B, S | L | N, H, K) each."""

    q: Tensor
    k: Tensor
    v: Tensor

    def split(self, first: int) -> tuple["Projections", "Projections"]:
        """Return those of the ``first`` tokens and those of the rest."""
        return (
            Projections(self.q[:, :first], self.k[:, :first], self.v[:, :first]),
            Projections(self.q[:, first:], self.k[:, first:], self.v[:, first:]),
        )


def forward(  # noqa: PLR0913  the inputs of the architecture
    model: HunyuanVideoTransformer3DModel,
    *,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    guidance: Tensor | None = None,
    sequence: SequenceParallel | None = None,
    run: Block | None = None,
) -> Tensor:
    """Predict the flow of noised latents; the names of the inputs are those of diffusers.

    Args:
        model: Parameters and configuration, ``image_condition_type`` None.
        hidden_states: (B, C, T, Y, X), noised, normalised latents; T, Y, X divisible by the patch.
        timestep: sigma * 1000, float32 (B,).
        encoder_hidden_states: (B, L, text dimension), the valid rows of each sample first; the
            others do not influence the result.
        encoder_attention_mask: (B, L), any dtype, 1 for valid rows and 0 for the others.
        pooled_projections: (B, pooled dimension), the pooled CLIP text.
        guidance: Scale of the distilled guidance * 1000, float32 (B,), where the configuration has
            ``guidance_embeds``, and there only.
        sequence: The processes that share these samples; all are given the same inputs and return
            the same result.
        run: Runs a block, `double_block` or `single_block`; by default as it is.

    Returns:
        (B, C, T, Y, X).
    """
    assert model.config.image_condition_type is None
    tokens_BSD, text_BLD = entry(
        model,
        latents_BCTYX=hidden_states,
        timestep_B=timestep,
        text_BLD=encoder_hidden_states,
        mask_BL=encoder_attention_mask,
        sequence=sequence,
    )
    condition = Conditioning(
        time_BD=embed_condition(
            model, timestep_B=timestep, pooled_BD=pooled_projections, guidance_B=guidance
        ),
        **_share(model, hidden_states, encoder_attention_mask, sequence),
    )
    for layer in model.transformer_blocks:
        tokens_BSD, text_BLD = (run or double_block)(layer, tokens_BSD, text_BLD, condition)
    for layer in model.single_transformer_blocks:
        tokens_BSD, text_BLD = (run or single_block)(layer, tokens_BSD, text_BLD, condition)
    return leave(model, tokens_BSD, condition, shape=hidden_states.shape[2:])


def attach(model: HunyuanVideoTransformer3DModel, how: Execution) -> None:
    """Make calls of ``model`` and its blocks run the functions of this file."""
    execution.attach(model.transformer_blocks, double_block, how)
    execution.attach(model.single_transformer_blocks, single_block, how)
    model.forward = functools.partial(forward, model, sequence=how.sequence, run=execution.call)


def entry(
    model: HunyuanVideoTransformer3DModel,
    *,
    latents_BCTYX: Tensor,
    timestep_B: Tensor,
    text_BLD: Tensor,
    mask_BL: Tensor,
    sequence: SequenceParallel | None = None,
) -> Streams:
    """Patchify the video and refine the text, which knows the timestep and its own mean.

    The text is short: all processes that share a sample refine all of it, and keep their part.
    """
    refiner = model.context_embedder
    embed = refiner.time_text_embed
    weight_BL1 = mask_BL.float().unsqueeze(2)
    mean_BD = ((text_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)).to(text_BLD.dtype)
    time_BD = embed_steps(embed.time_proj, embed.timestep_embedder, timestep_B)
    time_BD = time_BD + embed.text_embedder(mean_BD)
    refined_BLD = refiner.token_refiner(refiner.proj_in(text_BLD), time_BD, mask_BL)
    if sequence is None:
        return model.x_embedder(latents_BCTYX), refined_BLD
    frames, y, x = _grid(model, latents_BCTYX.shape[2:])
    tokens = sequence.part(frames * y * x)
    needed, ours = frames_of(tokens, per_frame=y * x)
    step = model.config.patch_size_t
    slab = latents_BCTYX[:, :, needed.start * step : needed.stop * step]
    return model.x_embedder(slab)[:, ours], refined_BLD[:, sequence.part(refined_BLD.shape[1])]


def _grid(model: HunyuanVideoTransformer3DModel, shape: torch.Size) -> tuple[int, int, int]:
    config = model.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    t, y, x = (size // step for size, step in zip(shape, patch, strict=True))
    return t, y, x


def _share(
    model: HunyuanVideoTransformer3DModel,
    latents_BCTYX: Tensor,
    mask_BL: Tensor,
    sequence: SequenceParallel | None,
) -> dict[str, Any]:
    """Say who has which tokens, which are keys, and where ours are."""
    t, y, x = _grid(model, latents_BCTYX.shape[2:])
    num_video, num_text = t * y * x, mask_BL.shape[1]
    video = sequence.parts(num_video) if sequence else [slice(0, num_video)]
    text = sequence.parts(num_text) if sequence else [slice(0, num_text)]
    ours = sequence.part(num_video) if sequence else slice(0, num_video)
    rows = torch.arange(num_text, device=mask_BL.device)
    valid_BL = rows < mask_BL.sum(1, keepdim=True, dtype=torch.int)
    pieces = [
        F.pad(valid_BL[:, words], (tokens.stop - tokens.start, 0), value=True)
        for tokens, words in zip(video, text, strict=True)
    ]
    cos, sin = model.rope(latents_BCTYX)
    return {
        "mask_B11N": torch.cat(pieces, dim=1)[:, None, None],
        "rotary": (cos[None, ours, None], sin[None, ours, None]),
        "sizes": [piece.shape[1] for piece in pieces],
        "sequence": sequence,
    }


def embed_condition(
    model: HunyuanVideoTransformer3DModel,
    *,
    timestep_B: Tensor,
    pooled_BD: Tensor,
    guidance_B: Tensor | None,
) -> Tensor:
    """Sum the embeddings of timestep, guidance and pooled text: (B, D)."""
    embed = model.time_text_embed
    assert (guidance_B is None) == (embed.guidance_embedder is None)
    time_BD = embed_steps(embed.time_proj, embed.timestep_embedder, timestep_B)
    if guidance_B is not None:
        time_BD = time_BD + embed_steps(embed.time_proj, embed.guidance_embedder, guidance_B)
    out: Tensor = time_BD + embed.text_embedder(pooled_BD)
    return out


def embed_steps(waves: Timesteps, embedder: TimestepEmbedding, steps_B: Tensor) -> Tensor:
    """Embed numbers up to some thousands in the dtype of the weights, also under autocast.

    Training has float32 weights; bfloat16 cannot tell step 987 from 988.
    """
    with torch.autocast(steps_B.device.type, enabled=False):
        out: Tensor = embedder(waves(steps_B).to(embedder.linear_1.weight.dtype))
    return out


def double_block(
    layer: HunyuanVideoTransformerBlock,
    tokens_BSD: Tensor,
    text_BLD: Tensor,
    condition: Conditioning,
) -> Streams:
    """One block with weights of their own for video and text, which meet in its attention."""
    video, video_ffn = _modulations(layer.norm1, condition.time_BD)
    text, text_ffn = _modulations(layer.norm1_context, condition.time_BD)
    attended_BND = joint_attention(
        _project_video(layer.attn, modulate(layer.norm1.norm, tokens_BSD, video)),
        _project_text(layer.attn, modulate(layer.norm1_context.norm, text_BLD, text)),
        condition,
    )
    attended_BSD, attended_BLD = _split(attended_BND, tokens_BSD)
    tokens_BSD = tokens_BSD + layer.attn.to_out[0](attended_BSD) * video.gate_B1D
    text_BLD = text_BLD + layer.attn.to_add_out(attended_BLD) * text.gate_B1D

    normed_BSD = modulate(layer.norm2, tokens_BSD, video_ffn)
    normed_BLD = modulate(layer.norm2_context, text_BLD, text_ffn)
    return (
        tokens_BSD + layer.ff(normed_BSD) * video_ffn.gate_B1D,
        text_BLD + layer.ff_context(normed_BLD) * text_ffn.gate_B1D,
    )


def single_block(
    layer: HunyuanVideoSingleTransformerBlock,
    tokens_BSD: Tensor,
    text_BLD: Tensor,
    condition: Conditioning,
) -> Streams:
    """One block over video and text as one sequence, attention and feed-forward side by side."""
    tokens_BND = torch.cat((tokens_BSD, text_BLD), dim=1)
    (modulation,) = _modulations(layer.norm, condition.time_BD)
    normed_BND = modulate(layer.norm.norm, tokens_BND, modulation)
    hidden = layer.act_mlp(layer.proj_mlp(normed_BND))
    video, text = _project_video(layer.attn, normed_BND).split(tokens_BSD.shape[1])
    attended_BND = joint_attention(video, text, condition)
    out_BND = layer.proj_out(torch.cat((attended_BND, hidden), dim=2))
    return _split(tokens_BND + out_BND * modulation.gate_B1D, tokens_BSD)


def modulate(norm: nn.Module, x_BSD: Tensor, modulation: Modulation) -> Tensor:
    """Normalise, then scale and shift; in the dtype of ``x``.

    Autocast normalises in float32, and would cast the result for each projection that takes it.
    """
    out: Tensor = norm(x_BSD) * (1 + modulation.scale_B1D) + modulation.shift_B1D
    return out.to(x_BSD.dtype)


def joint_attention(video: Projections, text: Projections, condition: Conditioning) -> Tensor:
    """Attention of video and valid text to each other, (B, N, D); only the video has positions."""
    attended_BNHK = attention.shared(
        torch.cat((attention.rotate(video.q, condition.rotary), text.q), dim=1),
        torch.cat((attention.rotate(video.k, condition.rotary), text.k), dim=1),
        torch.cat((video.v, text.v), dim=1),
        sequence=condition.sequence,
        sizes=condition.sizes,
        mask_B11N=condition.mask_B11N,
    )
    return attended_BNHK.flatten(2, 3)


def leave(
    model: HunyuanVideoTransformer3DModel,
    tokens_BSD: Tensor,
    condition: Conditioning,
    *,
    shape: torch.Size,
) -> Tensor:
    """Final norm and projection, back to (B, C, T, Y, X) of the latent ``shape`` (T, Y, X)."""
    config, grid = model.config, _grid(model, shape)
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    patches_BSD = model.proj_out(model.norm_out(tokens_BSD, condition.time_BD))
    if condition.sequence is not None:
        num_tokens = grid[0] * grid[1] * grid[2]
        sizes = [part.stop - part.start for part in condition.sequence.parts(num_tokens)]
        patches_BSD = condition.sequence.gather(patches_BSD, sizes=sizes)
    patches = patches_BSD.unflatten(1, grid)
    # B t y x C pt py px -> B C (t pt) (y py) (x px)
    image: Tensor = patches.unflatten(-1, (-1, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return image.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _modulations(
    norm: AdaLayerNormZero | AdaLayerNormZeroSingle, time_BD: Tensor
) -> list[Modulation]:
    """Return the modulation of attention and, in double blocks, that of the feed-forward."""
    vectors = norm.linear(norm.silu(time_BD)).unsqueeze(1).split(time_BD.shape[1], dim=2)
    return [Modulation(*vectors[first : first + 3]) for first in range(0, len(vectors), 3)]


def _project_video(layer: Attention, x_BSD: Tensor) -> Projections:
    return Projections(
        layer.norm_q(_heads(layer, layer.to_q(x_BSD))),
        layer.norm_k(_heads(layer, layer.to_k(x_BSD))),
        _heads(layer, layer.to_v(x_BSD)),
    )


def _project_text(layer: Attention, x_BLD: Tensor) -> Projections:
    return Projections(
        layer.norm_added_q(_heads(layer, layer.add_q_proj(x_BLD))),
        layer.norm_added_k(_heads(layer, layer.add_k_proj(x_BLD))),
        _heads(layer, layer.add_v_proj(x_BLD)),
    )


def _heads(layer: Attention, x_BSD: Tensor) -> Tensor:
    split: Tensor = x_BSD.unflatten(2, (layer.heads, -1))
    return split


def _split(x_BND: Tensor, video_BSD: Tensor) -> Streams:
    """Cut the joint sequence where the video ends."""
    num_tokens = video_BSD.shape[1]
    return x_BND[:, :num_tokens], x_BND[:, num_tokens:]
