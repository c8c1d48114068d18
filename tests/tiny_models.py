# SPDX-License-Identifier: Apache-2.0
"""Transformers of tiny models and what training gives them, without files and pipelines."""

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastvideo.config.lora import targets
from fastvideo.config.train import Lora
from fastvideo.cost.layers import Tokens
from fastvideo.models import hunyuan_forward, wan_forward
from fastvideo.models.execution import Execution, Recompute
from fastvideo.models.tiny_configs import TRANSFORMERS
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
    pair: Pair, policy: Recompute = "none", *, method: Lora | None = None, dtype: str = "float32"
) -> nn.Module:
    """A transformer with our forward; with ``method`` frozen, and adapters of peft's train."""
    model = build(pair)
    if method:
        add_adapters(model, method, dtype=dtype)
    functions(pair).attach(model, Execution(recompute=policy))
    return model


def forward(pair: Pair, model: nn.Module, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    """A forward pass whose inputs nobody else holds."""

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            out: Tensor = model(**inputs(pair, shape))
        return out

    return run


def linears(model: nn.Module) -> list[str]:
    """Names of the matrix products that may get an adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def add_adapters(model: nn.Module, method: Lora, *, dtype: str) -> None:
    """Freeze a model, hold it as it is computed with, and let adapters and norms train."""
    chosen = targets(method, linears(model))
    model.requires_grad_(False)
    if dtype == "bfloat16":
        _hold_in_bfloat16(model)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=2 * method.rank,
        target_modules="|".join(map(re.escape, chosen)),
        lora_bias=method.biases,
    )
    inject_adapter_in_model(config, model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _prepare(module, method)
    for name, parameter in model.named_parameters():
        if method.norms and re.search(r"^\w*blocks\.\d+\..*norm", name) and parameter.ndim == 1:
            parameter.requires_grad_("linear" not in name)


def _hold_in_bfloat16(model: nn.Module) -> None:
    """What autocast would cast, and nothing else."""
    exact = {m for t in model.modules() if isinstance(t, TimestepEmbedding) for m in t.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d) and module not in exact:
            module.bfloat16()


def _prepare(layer: LoraLayer, method: Lora) -> None:
    layer.cast_input_dtype_enabled = False
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        part.float()
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    if method.dropout:
        layer.lora_dropout["default"] = _Dropout(method.dropout)


class _Dropout(nn.Module):
    """Leaves the same numbers of all tokens of a sample out."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], *(1 for _ in x.shape[2:]), x.shape[-1])
        return x * torch.empty(shape, dtype=x.dtype).bernoulli_(1 - self.share)
