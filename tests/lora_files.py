# SPDX-License-Identifier: Apache-2.0
"""Adapters of tiny models with random numbers, and what tests do with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers
from fastvideo.models.lora_file import Adapter
from fastvideo.models.lora_pair import Pair
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.tiny_world import Pair as Model

KERNELS = {"patch_embedding": (1, 2, 2), "x_embedder.proj": (1, 2, 2)}
"""Convolutions, as published."""


def random_adapter(
    model: Model,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    biases: bool = False,
    only: Callable[[str], bool] = lambda name: True,
    seed: int = 0,
) -> Adapter:
    """An adapter of every projection, or of those that ``only`` chooses."""
    draw = torch.Generator().manual_seed(seed)
    pairs = {}
    for linear in layers(
        TRANSFORMERS[model.family, model.task], model.family, Tokens(1, 1)
    ).linears:
        if not only(linear.name):
            continue
        kernel = KERNELS.get(linear.name, ())
        channels = linear.inputs // 4 if kernel else linear.inputs
        pairs[linear.name] = Pair(
            down=torch.randn(rank, channels, *kernel, generator=draw) * 0.3,
            up=torch.randn(linear.outputs, rank, *(1 for _ in kernel), generator=draw) * 0.3,
            alpha=alpha,
            bias=torch.randn(linear.outputs, generator=draw) * 0.3 if biases else None,
        )
    return Adapter.of(pairs)


def in_blocks(name: str) -> bool:
    """Of the repeated blocks, attention and feed-forward layers, not modulations."""
    return "blocks." in name and "refiner" not in name and "norm" not in name


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Names, dtypes and numbers."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def inject(transformer: Any, adapter: Adapter) -> None:
    """Put an adapter into a transformer of diffusers with PEFT alone, as training does."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    pairs = adapter.pairs()
    has_biases = any(pair.bias is not None for pair in pairs.values())
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(pairs),
        alpha_pattern={f"^{name}": pair.alpha for name, pair in pairs.items()},
        rank_pattern={f"^{name}": pair.rank for name, pair in pairs.items()},
        lora_bias=has_biases,
    )
    transformer.add_adapter(config)
    report = set_peft_model_state_dict(transformer, dict(adapter.tensors), "default")
    assert not report.unexpected_keys, report.unexpected_keys


def load(model: Model, folder: Path) -> Any:
    """The pipeline of diffusers, without anything of ours."""
    import diffusers

    names = {
        ("wan2.2-ti2v-5b", "i2v"): "WanImageToVideoPipeline",
        ("hunyuan-video", "t2v"): "HunyuanVideoPipeline",
    }
    other = "WanImageToVideoPipeline" if model.task == "i2v" else "WanPipeline"
    pipe = getattr(diffusers, names.get((model.family, model.task), other)).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, model: Model) -> Tensor:
    """Latents, whose numbers no picture rounds; of both experts."""
    given: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 3}
    if model.task == "i2v":
        pixels = np.random.default_rng(0).integers(0, 255, (32, model.width, 3), np.uint8)
        given["image"] = Image.fromarray(pixels)
    latents: Tensor = pipe(
        prompt="a red square",
        num_frames=5,
        height=32,
        width=model.width,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        **given,
    ).frames
    return latents
