# SPDX-License-Identifier: Apache-2.0
"""Transformers of tiny models and what training gives them, without files and pipelines."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

from fastvideo.config.train import Full, Lora, Train
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import FULL
from fastvideo.models import hunyuan_forward, wan_forward, weights
from fastvideo.models.execution import Execution, Recompute
from fastvideo.models.tiny_configs import TRANSFORMERS
from fastvideo.train.method import build_method
from tests.tiny_world import PAIRS, Pair

ARCHITECTURES = list({str(TRANSFORMERS[p.family, p.task]): p for p in reversed(PAIRS)}.values())
"""One twin of each configuration."""


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


def functions(pair: Pair) -> Any:
    """The module with our forward."""
    return hunyuan_forward if pair.family == "hunyuan-video" else wan_forward


def attached(
    pair: Pair,
    policy: Recompute = "none",
    *,
    method: Full | Lora = FULL,
    dtype: str = "float32",
) -> nn.Module:
    """A transformer with our forward, prepared as training does with ``method``."""
    model = build(pair)
    if method != FULL:
        _prepare(model, Train.model_validate({"method": method, "dtype": dtype}))
    functions(pair).attach(model, Execution(recompute=policy))
    return model


def _prepare(model: nn.Module, train: Train) -> None:
    """Let train what does, with numbers as after a while, for micro-batches of two."""
    method = build_method(train)
    method.prepare(model)
    weights.materialise(model, "cpu")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    method.draw(model, (0, 1), device="cpu")


def forward(pair: Pair, model: nn.Module, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    """A forward pass whose inputs nobody else holds."""

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            out: Tensor = model(**inputs(pair, shape))
        return out

    return run
