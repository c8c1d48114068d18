# SPDX-License-Identifier: Apache-2.0
"""Bytes of ComfyUI's files, counted against those of real ones."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastvideo.config.recipe import Recipe
from fastvideo.cost.adapters import UP
from fastvideo.cost.transformer import ONE, trained_layers, trained_parameters
from fastvideo.models.lora_file import write_comfyui
from fastvideo.models.lora_size import comfyui_bytes
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.lora_files import random_adapter
from tests.tiny_world import WAN21, Pair

RECIPES = Path(__file__).parents[3] / "configs/recipes"
HUNYUAN = Pair("hunyuan-video")


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("targets", ["blocks", "attention"])
@pytest.mark.parametrize("model", [WAN21, HUNYUAN], ids=str)
def test_a_comfyui_file_is_as_large_as_counted(
    tmp_path: Path, model: Pair, targets: str, biases: bool
) -> None:
    """Of HunyuanVideo it is larger than the LoRA, also where parts of a projection do not train."""
    name = "tiny_hunyuan_t2v_lora" if model == HUNYUAN else "tiny_wan2.1_t2v_lora"
    method = f"train.method={{kind: lora, rank: 3, targets: {targets}, biases: {biases}}}"
    recipe = Recipe.load(RECIPES / f"{name}.yaml", [method, "export.dtype=bfloat16"])
    config = TRANSFORMERS[model.family, model.task]
    linears = trained_layers(recipe, config, ONE).linears
    adapted = {li.name.removesuffix(f".{UP}") for li in linears if li.name.endswith(f".{UP}")}
    adapter = random_adapter(model, rank=3, biases=biases, only=adapted.__contains__)
    write_comfyui(tmp_path / "x.safetensors", adapter, family=model.family)
    tensors = load_file(tmp_path / "x.safetensors").values()
    counted = comfyui_bytes(recipe, config)
    assert counted == 2 * sum(tensor.numel() for tensor in tensors if tensor.ndim > 0)
    lora = 2 * trained_parameters(recipe, config)
    assert counted > lora if model == HUNYUAN else counted == lora


def test_a_full_finetune_has_none() -> None:
    recipe = Recipe.load(RECIPES / "tiny_wan2.1_t2v_full.yaml", [])
    assert comfyui_bytes(recipe, TRANSFORMERS["wan2.1", "t2v"]) == 0
