# SPDX-License-Identifier: Apache-2.0
"""How large the LoRA file for ComfyUI of what a recipe trains is; no torch."""

from collections.abc import Mapping
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.cost.adapters import UP
from fastvideo.cost.disk import BYTES
from fastvideo.cost.layers import Linear
from fastvideo.cost.transformer import ONE, trained_layers
from fastvideo.models.lora_names import own_name


def comfyui_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """The tensors of the file that ``export.comfyui`` adds for a transformer, but for alphas.

    Where the model's own code has several projections in one, the ranks of those that train add up
    and B has the outputs of all of them, see ``lora_pair.fuse``.
    """
    method = recipe.train.method
    if not isinstance(method, Lora):
        return 0
    linears = {linear.name: linear for linear in trained_layers(recipe, config, ONE).linears}
    adapted = [name.removesuffix(f".{UP}") for name in linears if name.endswith(f".{UP}")]
    named = {own_name(name, recipe.model.family) for name in adapted}
    fused = [[linears[part] for part in own[1]] for own in named if own is not None]
    numbers = sum(_numbers(parts, set(adapted), method) for parts in fused)
    return BYTES[recipe.export.dtype] * numbers


def _numbers(parts: list[Linear], adapted: set[str], method: Lora) -> int:
    rank = method.rank * sum(part.name in adapted for part in parts)
    outputs = sum(part.outputs for part in parts)
    return rank * (parts[0].inputs + outputs) + outputs * method.biases
