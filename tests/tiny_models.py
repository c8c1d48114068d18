# SPDX-License-Identifier: Apache-2.0
"""Transformers of tiny models and what training gives them, without files and pipelines."""

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from fastvideo.cost.layers import Tokens
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.tiny_world import Pair


def build(pair: Pair) -> nn.Module:
    config = TRANSFORMERS[pair.family, pair.task]
    kind = HunyuanVideoTransformer3DModel if "hunyuan" in pair.family else WanTransformer3DModel
    model: nn.Module = kind(**config)
    return model


def inputs(pair: Pair, shape: tuple[int, ...]) -> dict[str, Tensor]:
    config = TRANSFORMERS[pair.family, pair.task]
    batch, *grid = shape
    given = {
        "hidden_states": torch.randn(batch, config["in_channels"], *grid),
        "timestep": torch.rand(batch),
    }
    if pair.family == "hunyuan-video":
        return {
            **given,
            "encoder_hidden_states": torch.randn(batch, 256, config["text_embed_dim"]),
            "encoder_attention_mask": (torch.arange(256) < 200).float().repeat(batch, 1),
            "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
            "guidance": torch.rand(batch),
        }
    given["encoder_hidden_states"] = torch.randn(batch, 512, config["text_dim"])
    if "ti2v" in pair.family:
        given["timestep"] = given["timestep"][:, None].repeat(1, grid[0] * grid[1] * grid[2] // 4)
    if "image_dim" in config:
        given["encoder_hidden_states_image"] = torch.randn(batch, 257, config["image_dim"])
    return given


def tokens(pair: Pair, shape: tuple[int, ...]) -> Tokens:
    batch, frames, height, width = shape
    return Tokens(
        video=frames * height * width // 4,
        text=256 if pair.family == "hunyuan-video" else 512,
        image=257 if "image_dim" in TRANSFORMERS[pair.family, pair.task] else 0,
        runs=frames if "ti2v" in pair.family else 1,
        batch=batch,
    )
