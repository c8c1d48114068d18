# SPDX-License-Identifier: Apache-2.0
"""The adapters of checkpoints as LoRA files that diffusers, and ComfyUI, load."""

from pathlib import Path

from fastvideo.checkpoint import Part
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
    part: Part = "average" if recipe.export.ema else "model"
    found = read_adapter(recipe, base, transformer=transformer, checkpoint=checkpoint, part=part)
    write_lora(target / LORA_FILES[transformer], found.adapter)
    if found.others:
        write_tensors(target / NORM_FILES[transformer], found.others, metadata={"format": "pt"})
    if recipe.export.comfyui:
        path = target / COMFYUI_FILES[transformer]
        write_comfyui(path, found.adapter, family=recipe.model.family)
