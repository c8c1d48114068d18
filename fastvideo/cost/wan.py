# SPDX-License-Identifier: Apache-2.0
"""The layers of Wan's transformer, of Wan2.1 and Wan2.2, with and without image conditions."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fastvideo.cost.layers import Attention, Layers, Linear, Tokens


def layers(config: Mapping[str, Any], tokens: Tokens) -> Layers:
    """Read the layers from a config.json of diffusers' ``WanTransformer3DModel``."""
    blocks = tuple(f"blocks.{index}" for index in range(config["num_layers"]))
    linears = list(_ends(config, tokens))
    tables = dict(_tables(config))
    attentions: list[Attention] = []
    for block in blocks:
        linears += _block_linears(config, tokens, block)
        tables |= _block_tables(config, block)
        attentions += _block_attentions(config, tokens, block)
    return Layers(tuple(linears), tables, tuple(attentions), blocks)


def width(config: Mapping[str, Any]) -> int:
    """Numbers of a token between blocks."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _ends(config: Mapping[str, Any], tokens: Tokens) -> Iterator[Linear]:
    """What comes before the blocks, and after."""
    wide, patch = width(config), math.prod(config["patch_size"])
    embed = "condition_embedder"
    channels = config["in_channels"] * patch
    yield Linear("patch_embedding", channels, wide, tokens.video, convolution=True)
    time = f"{embed}.time_embedder"
    yield Linear(f"{time}.linear_1", config["freq_dim"], wide, tokens.runs, exact=True)
    yield Linear(f"{time}.linear_2", wide, wide, tokens.runs, exact=True)
    yield Linear(f"{embed}.time_proj", wide, 6 * wide, tokens.runs)
    yield Linear(f"{embed}.text_embedder.linear_1", config["text_dim"], wide, tokens.text)
    yield Linear(f"{embed}.text_embedder.linear_2", wide, wide, tokens.text)
    if image := config.get("image_dim"):
        yield Linear(f"{embed}.image_embedder.ff.net.0.proj", image, image, tokens.image)
        yield Linear(f"{embed}.image_embedder.ff.net.2", image, wide, tokens.image)
    outputs = (config.get("out_channels") or config["in_channels"]) * patch
    yield Linear("proj_out", wide, outputs, tokens.video)


def _tables(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    wide = width(config)
    yield "scale_shift_table", 2 * wide
    if image := config.get("image_dim"):
        embed = "condition_embedder.image_embedder"
        for name, size in (("norm1", image), ("norm2", wide)):
            yield f"{embed}.{name}.weight", size
            yield f"{embed}.{name}.bias", size
        if places := config.get("pos_embed_seq_len"):
            yield f"{embed}.pos_embed", places * image


def _block_linears(config: Mapping[str, Any], tokens: Tokens, block: str) -> Iterator[Linear]:
    wide, hidden, added = width(config), config["ffn_dim"], config.get("added_kv_proj_dim")
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield Linear(f"{block}.attn1.{name}", wide, wide, tokens.video)
    for name in ("to_q", "to_out.0"):
        yield Linear(f"{block}.attn2.{name}", wide, wide, tokens.video)
    for name in ("to_k", "to_v"):
        yield Linear(f"{block}.attn2.{name}", wide, wide, tokens.text)
    if added:
        for name in ("add_k_proj", "add_v_proj"):
            yield Linear(f"{block}.attn2.{name}", added, wide, tokens.image)
    yield Linear(f"{block}.ffn.net.0.proj", wide, hidden, tokens.video)
    yield Linear(f"{block}.ffn.net.2", hidden, wide, tokens.video)


def _block_tables(config: Mapping[str, Any], block: str) -> dict[str, int]:
    wide = width(config)
    norms = ["attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k"]
    if config.get("added_kv_proj_dim"):
        norms.append("attn2.norm_added_k")
    tables = {f"{block}.{norm}.weight": wide for norm in norms}
    if config.get("cross_attn_norm", True):
        tables |= {f"{block}.norm2.weight": wide, f"{block}.norm2.bias": wide}
    return tables | {f"{block}.scale_shift_table": 6 * wide}


def _block_attentions(config: Mapping[str, Any], tokens: Tokens, block: str) -> Iterator[Attention]:
    wide = width(config)
    yield Attention(f"{block}.attn1", tokens.video, tokens.video, wide)
    yield Attention(f"{block}.attn2", tokens.video, tokens.text, wide)
    if config.get("added_kv_proj_dim"):
        yield Attention(f"{block}.attn2.added", tokens.video, tokens.image, wide)
