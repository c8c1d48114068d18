# SPDX-License-Identifier: Apache-2.0
"""The layers of HunyuanVideo's text-to-video transformer."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastvideo.cost.layers import Attention, Layers, Linear, Tokens

TIME_DIM = 256
"""Sines and cosines of a timestep, fixed in diffusers' class."""
REFINER_RATIO = 4
"""Width inside the feed-forward layers of the text's own blocks, by theirs; fixed there too."""


def layers(config: Mapping[str, Any], tokens: Tokens) -> Layers:
    """Read the layers from a config.json of diffusers' ``HunyuanVideoTransformer3DModel``."""
    double = [f"transformer_blocks.{index}" for index in range(config["num_layers"])]
    single = [f"single_transformer_blocks.{i}" for i in range(config["num_single_layers"])]
    wide, joint = width(config), tokens.video + tokens.text
    linears = [*_ends(config, tokens), *_refiner(config, tokens)]
    tables = dict(_refiner_tables(config))
    attentions = [
        Attention(f"{block}.attn", tokens.text, tokens.text, wide)
        for block in refiner_blocks(config)
    ]
    for block in double:
        linears += _double(config, tokens, block)
        tables |= {f"{block}.attn.{name}.weight": head(config) for name in _NORMS + _ADDED_NORMS}
        attentions.append(Attention(f"{block}.attn", joint, joint, wide))
    for block in single:
        linears += _single(config, joint, block)
        tables |= {f"{block}.attn.{name}.weight": head(config) for name in _NORMS}
        attentions.append(Attention(f"{block}.attn", joint, joint, wide))
    return Layers(tuple(linears), tables, tuple(attentions), (*double, *single))


def width(config: Mapping[str, Any]) -> int:
    """Numbers of a token between blocks."""
    return int(config["num_attention_heads"] * head(config))


def head(config: Mapping[str, Any]) -> int:
    """Numbers of a token in one head."""
    return int(config["attention_head_dim"])


def hidden(config: Mapping[str, Any]) -> int:
    """Numbers of a token inside a feed-forward layer."""
    return int(width(config) * config.get("mlp_ratio", 4.0))


def refiner_blocks(config: Mapping[str, Any]) -> list[str]:
    """Prefixes of the blocks that only the text goes through."""
    prefix = "context_embedder.token_refiner.refiner_blocks"
    return [f"{prefix}.{index}" for index in range(config["num_refiner_layers"])]


_NORMS = ("norm_q", "norm_k")
_ADDED_NORMS = ("norm_added_q", "norm_added_k")


def _ends(config: Mapping[str, Any], tokens: Tokens) -> Iterator[Linear]:
    """What comes before the blocks, the text apart, and after."""
    wide = width(config)
    patch = config.get("patch_size", 2) ** 2 * config.get("patch_size_t", 1)
    outputs = (config.get("out_channels") or config["in_channels"]) * patch
    channels = config["in_channels"] * patch
    yield Linear("x_embedder.proj", channels, wide, tokens.video, convolution=True)
    embedders = ["timestep_embedder"]
    if config.get("guidance_embeds"):
        embedders.append("guidance_embedder")
    for name in embedders:
        yield from _embedder(f"time_text_embed.{name}", TIME_DIM, wide, exact=True)
    pooled = config["pooled_projection_dim"]
    yield from _embedder("time_text_embed.text_embedder", pooled, wide)
    yield Linear("norm_out.linear", wide, 2 * wide, 1)
    yield Linear("proj_out", wide, outputs, tokens.video)


def _refiner(config: Mapping[str, Any], tokens: Tokens) -> Iterator[Linear]:
    """What only the text goes through."""
    wide, text = width(config), config["text_embed_dim"]
    embed = "context_embedder.time_text_embed"
    yield from _embedder(f"{embed}.timestep_embedder", TIME_DIM, wide, exact=True)
    yield from _embedder(f"{embed}.text_embedder", text, wide)
    yield Linear("context_embedder.proj_in", text, wide, tokens.text)
    for block in refiner_blocks(config):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield Linear(f"{block}.attn.{name}", wide, wide, tokens.text)
        yield from _feed_forward(wide, REFINER_RATIO * wide, f"{block}.ff", tokens.text)
        yield Linear(f"{block}.norm_out.linear", wide, 2 * wide, 1)


def _refiner_tables(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for block in refiner_blocks(config):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            yield f"{block}.{name}", width(config)


def _double(config: Mapping[str, Any], tokens: Tokens, block: str) -> Iterator[Linear]:
    wide = width(config)
    for name in ("norm1", "norm1_context"):
        yield Linear(f"{block}.{name}.linear", wide, 6 * wide, 1)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield Linear(f"{block}.attn.{name}", wide, wide, tokens.video)
    for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield Linear(f"{block}.attn.{name}", wide, wide, tokens.text)
    inner = hidden(config)
    yield from _feed_forward(wide, inner, f"{block}.ff", tokens.video)
    yield from _feed_forward(wide, inner, f"{block}.ff_context", tokens.text)


def _single(config: Mapping[str, Any], joint: int, block: str) -> Iterator[Linear]:
    wide = width(config)
    yield Linear(f"{block}.norm.linear", wide, 3 * wide, 1)
    for name in ("to_q", "to_k", "to_v"):
        yield Linear(f"{block}.attn.{name}", wide, wide, joint)
    yield Linear(f"{block}.proj_mlp", wide, hidden(config), joint)
    yield Linear(f"{block}.proj_out", wide + hidden(config), wide, joint)


def _embedder(name: str, inputs: int, wide: int, *, exact: bool = False) -> Iterator[Linear]:
    yield Linear(f"{name}.linear_1", inputs, wide, 1, exact=exact)
    yield Linear(f"{name}.linear_2", wide, wide, 1, exact=exact)


def _feed_forward(wide: int, inner: int, name: str, rows: int) -> Iterator[Linear]:
    yield Linear(f"{name}.net.0.proj", wide, inner, rows)
    yield Linear(f"{name}.net.2", inner, wide, rows)
