# SPDX-License-Identifier: Apache-2.0
"""The forward pass of Wan's transformer over diffusers' modules: entry, blocks, exit.

Equal to ``diffusers.WanTransformer3DModel.forward`` for the same parameters and arguments, in text-
and image-to-video models of Wan2.1 and Wan2.2; written out so that attention, sequence layout and
fused operations can be exchanged.

Axes: B batch, C channels, T/Y/X latent frames, rows and columns, S tokens of the video on this
process (all, unless it shares samples with others), L tokens of the text, I tokens of the image, D
model dimension, H heads, K head dimension, M modulations. G are runs of consecutive video tokens
with one timestep: the sample, a latent frame, or a token.
"""

import functools
from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor

from fastvideo.models import attention, execution
from fastvideo.models.execution import Block, Execution
from fastvideo.models.sequence import SequenceParallel, frames_of


@dataclass(frozen=True)
class Part:
    """Which of the N video tokens of a sample this process works on."""

    tokens: slice
    sizes: list[int] = field(default_factory=list)
    """Number of tokens of each process that shares the sample."""
    runs: Tensor | None = None
    """Length of each run of tokens with one timestep, int64, where they differ."""
    sequence: SequenceParallel | None = None


@dataclass(frozen=True)
class Conditioning:
    """What every block sees beside the tokens."""

    modulation_BGMD: Tensor
    text_BLD: Tensor
    image_BID: Tensor | None
    rotary: attention.Rotary
    part: Part


def attach(model: WanTransformer3DModel, how: Execution) -> None:
    """Make calls of ``model`` and its blocks run the functions of this file."""
    execution.attach(model.blocks, block, how)
    model.forward = functools.partial(forward, model, sequence=how.sequence, run=execution.call)


def forward(  # noqa: PLR0913  the inputs of the architecture
    model: WanTransformer3DModel,
    *,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    sequence: SequenceParallel | None = None,
    run: Block | None = None,
) -> Tensor:
    """Predict the flow of noised latents; the names of the inputs are those of diffusers.

    Args:
        model: Parameters and configuration.
        hidden_states: (B, C, T, Y, X), noised, normalised latents and what the checkpoint wants
            beside them; T, Y, X divisible by the patch.
        timestep: sigma * 1000, float32: (B,), or (B, S) of each video token in order of T, Y, X.
        encoder_hidden_states: (B, L, text dimension), text with zero rows up to the length the
            model was trained with.
        encoder_hidden_states_image: (B, I, image dimension), CLIP features, where the
            configuration has ``image_dim``, and there only.
        sequence: The processes that share these samples; all are given the same inputs and return
            the same result.
        run: Runs a block; by default `block`.

    Returns:
        (B, C, T, Y, X), C as the configuration's ``out_channels``.
    """
    run = run or block
    tokens_BSD, condition, time_BGD = entry(
        model,
        latents_BCTYX=hidden_states,
        timestep=timestep,
        text_BLD=encoder_hidden_states,
        image_BID=encoder_hidden_states_image,
        sequence=sequence,
    )
    for layer in model.blocks:
        tokens_BSD = run(layer, tokens_BSD, condition)
    return leave(model, tokens_BSD, time_BGD, part=condition.part, shape=hidden_states.shape[2:])


def entry(
    model: WanTransformer3DModel,
    *,
    latents_BCTYX: Tensor,
    timestep: Tensor,
    text_BLD: Tensor,
    image_BID: Tensor | None = None,
    sequence: SequenceParallel | None = None,
) -> tuple[Tensor, Conditioning, Tensor]:
    """Patchify and embed: tokens (B, S, D), what blocks are conditioned on, time (B, G, D)."""
    embed = model.condition_embedder
    assert (image_BID is None) == (embed.image_embedder is None)
    grid = _grid(model, latents_BCTYX.shape[2:])
    timestep_BG, part = _share(timestep, grid=grid, sequence=sequence)
    time_BGD = _embed_time(model, timestep_BG).to(text_BLD.dtype)
    cos, sin = model.rope(latents_BCTYX)
    condition = Conditioning(
        modulation_BGMD=embed.time_proj(embed.act_fn(time_BGD)).unflatten(2, (6, -1)),
        text_BLD=embed.text_embedder(text_BLD),
        image_BID=None if image_BID is None else embed.image_embedder(image_BID),
        rotary=(cos[:, part.tokens], sin[:, part.tokens]),
        part=part,
    )
    return _patchify(model, latents_BCTYX, part=part, grid=grid), condition, time_BGD


def _grid(model: WanTransformer3DModel, shape: torch.Size) -> tuple[int, int, int]:
    t, y, x = (size // step for size, step in zip(shape, model.config.patch_size, strict=True))
    return t, y, x


def _patchify(
    model: WanTransformer3DModel, latents_BCTYX: Tensor, *, part: Part, grid: tuple[int, int, int]
) -> Tensor:
    """Embed the patches of our tokens (B, S, D); of others only what shares a latent frame."""
    frames, ours = frames_of(part.tokens, per_frame=grid[1] * grid[2])
    step = model.config.patch_size[0]
    slab = latents_BCTYX[:, :, frames.start * step : frames.stop * step]
    tokens_BSD: Tensor = model.patch_embedding(slab).flatten(2).transpose(1, 2)[:, ours]
    return tokens_BSD.contiguous()


def _share(
    timestep: Tensor, *, grid: tuple[int, int, int], sequence: SequenceParallel | None
) -> tuple[Tensor, Part]:
    """Return the (B, G) timesteps of our tokens and which tokens they are.

    G is as small as the values allow: modulations of every token would take 2 GB at the size of
    Wan2.2 TI2V-5B, whose timesteps differ between frames only. Looking at the values of (B, N)
    timesteps waits for the device, once per forward.
    """
    num_frames, per_frame = grid[0], grid[1] * grid[2]
    num_tokens = num_frames * per_frame
    parts = sequence.parts(num_tokens) if sequence else [slice(0, num_tokens)]
    tokens = sequence.part(num_tokens) if sequence else parts[0]
    sizes = [part.stop - part.start for part in parts]
    if timestep.ndim == 1:
        return timestep.unsqueeze(1), Part(tokens, sizes, None, sequence)
    frames = timestep.unflatten(1, (num_frames, -1))
    first = frames[:, :, :1]
    if not torch.equal(frames, first.expand_as(frames)):
        return timestep[:, tokens], Part(tokens, sizes, None, sequence)
    if sequence is None:
        return first.squeeze(2), Part(tokens, sizes, None, None)
    ours, _ = frames_of(tokens, per_frame=per_frame)
    lengths = [
        min(tokens.stop, (frame + 1) * per_frame) - max(tokens.start, frame * per_frame)
        for frame in range(ours.start, ours.stop)
    ]
    runs = torch.tensor(lengths, device=timestep.device)
    return first.squeeze(2)[:, ours], Part(tokens, sizes, runs, sequence)


def _embed_time(model: WanTransformer3DModel, timestep_BG: Tensor) -> Tensor:
    """Embed timesteps to (B, G, D) in the dtype of the embedder's weights, also under autocast.

    Pipelines keep these weights in float32; bfloat16 cannot tell step 987 from 988.
    """
    embed = model.condition_embedder
    with torch.autocast(timestep_BG.device.type, enabled=False):
        waves = embed.timesteps_proj(timestep_BG.flatten()).unflatten(0, timestep_BG.shape)
        time_BGD: Tensor = embed.time_embedder(waves.to(embed.time_embedder.linear_1.weight.dtype))
    return time_BGD


def block(layer: WanTransformerBlock, tokens_BSD: Tensor, condition: Conditioning) -> Tensor:
    """One transformer block; the residual stream keeps its dtype, sums are float32."""
    modulation_BGMD = layer.scale_shift_table + condition.modulation_BGMD.float()
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = _spread(modulation_BGMD, condition.part)
    dtype = tokens_BSD.dtype

    normed = modulate(layer.norm1(tokens_BSD.float()), scale_BGD=scale, shift_BGD=shift).to(dtype)
    attended = self_attention(layer.attn1, normed, condition)
    tokens_BSD = (tokens_BSD.float() + _per_run(attended, gate)).to(dtype)

    normed = layer.norm2(tokens_BSD.float()).to(dtype)
    tokens_BSD = tokens_BSD + cross_attention(layer.attn2, normed, condition)

    normed = modulate(layer.norm3(tokens_BSD.float()), scale_BGD=ffn_scale, shift_BGD=ffn_shift)
    out: Tensor = tokens_BSD.float() + _per_run(layer.ffn(normed.to(dtype)).float(), ffn_gate)
    return out.to(dtype)


def _spread(modulation_BGMD: Tensor, part: Part) -> tuple[Tensor, ...]:
    """Take modulations apart; where runs differ in length, to one for each token."""
    vectors_BGD = modulation_BGMD.unbind(2)
    if part.runs is None:
        return vectors_BGD
    size = part.tokens.stop - part.tokens.start
    return tuple(v.repeat_interleave(part.runs, dim=1, output_size=size) for v in vectors_BGD)


def modulate(x_BSD: Tensor, *, scale_BGD: Tensor, shift_BGD: Tensor) -> Tensor:
    """Scale and shift each run of tokens by its own vectors."""
    if scale_BGD.shape[1] == 1:
        return x_BSD * (1 + scale_BGD) + shift_BGD
    runs: Tensor = x_BSD.unflatten(1, (scale_BGD.shape[1], -1))
    return (runs * (1 + scale_BGD.unsqueeze(2)) + shift_BGD.unsqueeze(2)).flatten(1, 2)


def self_attention(layer: WanAttention, tokens_BSD: Tensor, condition: Conditioning) -> Tensor:
    """Attention of the video tokens to each other, with rotary positions."""
    q = attention.rotate(_heads(layer, layer.norm_q(layer.to_q(tokens_BSD))), condition.rotary)
    k = attention.rotate(_heads(layer, layer.norm_k(layer.to_k(tokens_BSD))), condition.rotary)
    v = _heads(layer, layer.to_v(tokens_BSD))
    part = condition.part
    return _out(layer, attention.shared(q, k, v, sequence=part.sequence, sizes=part.sizes))


def cross_attention(layer: WanAttention, tokens_BSD: Tensor, condition: Conditioning) -> Tensor:
    """Attention of the video tokens to the text, plus that to the image with its own keys.

    There is no mask: the zero rows after the text take part, as they did when Wan was trained.
    """
    q = _heads(layer, layer.norm_q(layer.to_q(tokens_BSD)))
    k = _heads(layer, layer.norm_k(layer.to_k(condition.text_BLD)))
    v = _heads(layer, layer.to_v(condition.text_BLD))
    attended = attention.dense(q, k, v)
    if condition.image_BID is not None:
        k = _heads(layer, layer.norm_added_k(layer.add_k_proj(condition.image_BID)))
        v = _heads(layer, layer.add_v_proj(condition.image_BID))
        attended = attended + attention.dense(q, k, v)
    return _out(layer, attended)


def leave(
    model: WanTransformer3DModel,
    tokens_BSD: Tensor,
    time_BGD: Tensor,
    *,
    part: Part,
    shape: torch.Size,
) -> Tensor:
    """Final norm and projection, back to (B, C, T, Y, X) of the latent ``shape`` (T, Y, X)."""
    shift, scale = _spread(model.scale_shift_table + time_BGD.unsqueeze(2), part)
    normed = modulate(model.norm_out(tokens_BSD.float()), scale_BGD=scale, shift_BGD=shift)
    patches_BSD = model.proj_out(normed.to(tokens_BSD.dtype))
    if part.sequence is not None:
        patches_BSD = part.sequence.gather(patches_BSD, sizes=part.sizes)
    patches = patches_BSD.unflatten(1, _grid(model, shape))
    # B t y x pt py px C -> B C (t pt) (y py) (x px)
    image: Tensor = patches.unflatten(-1, (*model.config.patch_size, -1)).permute(
        0, 7, 1, 4, 2, 5, 3, 6
    )
    return image.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _per_run(x_BSD: Tensor, gate_BGD: Tensor) -> Tensor:
    if gate_BGD.shape[1] == 1:
        return x_BSD * gate_BGD
    runs: Tensor = x_BSD.unflatten(1, (gate_BGD.shape[1], -1))
    return (runs * gate_BGD.unsqueeze(2)).flatten(1, 2)


def _heads(layer: WanAttention, x_BSD: Tensor) -> Tensor:
    split: Tensor = x_BSD.unflatten(2, (layer.heads, -1))
    return split


def _out(layer: WanAttention, x_BSHK: Tensor) -> Tensor:
    out: Tensor = layer.to_out[0](x_BSHK.flatten(2, 3))
    return out
