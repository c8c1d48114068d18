# SPDX-License-Identifier: Apache-2.0
"""The adapters of checkpoints as LoRA files that diffusers, and ComfyUI, load."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastvideo.checkpoint import part_of
from fastvideo.config.recipe import Recipe
from fastvideo.models.aligned import write_tensors
from fastvideo.models.lora_file import write_comfyui, write_lora
from fastvideo.state import COMFYUI_FILES, LORA_FILES, NORM_FILES
from fastvideo.trained_adapters import read_adapter


def write_adapters(
    target: Path, recipe: Recipe, *, base: Path, transformer: str, checkpoint: Path
) -> None:
    """Write the LoRA of a transformer into the folder ``target``.

    Raises:
        UserError: The checkpoint is damaged, or ComfyUI has no name for a projection.
    """
    part = part_of(checkpoint, average=recipe.averaged)
    found = read_adapter(recipe, base, transformer=transformer, checkpoint=checkpoint, part=part)
    adapter = replace(found.adapter, tensors=_cast(recipe, found.adapter.tensors))
    write_lora(target / LORA_FILES[transformer], adapter)
    if found.others:
        write_tensors(target / NORM_FILES[transformer], found.others)  # float32, as diffusers'
    if recipe.export.comfyui:
        write_comfyui(target / COMFYUI_FILES[transformer], adapter, family=recipe.model.family)


def _cast(recipe: Recipe, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dtype = getattr(torch, recipe.export.dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
