# SPDX-License-Identifier: Apache-2.0
"""Our LoRA files in pipelines of diffusers: the same latents, bit for bit, as the adapter gave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvideo.models.lora_file import NAMES, Adapter, write_comfyui, write_lora
from fastvideo.models.tiny import write_tiny
from tests.lora_files import in_blocks, inject, random_adapter
from tests.tiny_world import PAIRS, WAN21, Pair

EXPERTS = {"wan2.2-a14b": ("transformer", "transformer_2")}


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def model(request: pytest.FixtureRequest) -> Pair:
    pair: Pair = request.param
    return pair


@pytest.fixture(scope="module")
def folder(model: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / str(model)
    write_tiny(path, family=model.family, task=model.task)
    return path


def load(model: Pair, folder: Path) -> Any:
    import diffusers

    names = {
        ("wan2.2-ti2v-5b", "i2v"): "WanImageToVideoPipeline",
        ("hunyuan-video", "t2v"): "HunyuanVideoPipeline",
    }
    other = "WanImageToVideoPipeline" if model.task == "i2v" else "WanPipeline"
    pipe = getattr(diffusers, names.get((model.family, model.task), other)).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, model: Pair) -> Tensor:
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


def adapters(model: Pair, **how: Any) -> dict[str, Adapter]:
    """One for each transformer."""
    names = EXPERTS.get(model.family, ("transformer",))
    return {name: random_adapter(model, seed=i, **how) for i, name in enumerate(names)}


@pytest.mark.parametrize("biases", [False, True])
def test_a_fresh_pipeline_gives_what_the_adapter_gave_in_memory(
    model: Pair, folder: Path, tmp_path: Path, biases: bool
) -> None:
    """With alpha other than the rank; the folder for the first, the file for the second."""
    given = adapters(model, rank=4, alpha=10.0, biases=biases)
    trained, fresh, untouched = (load(model, folder) for _ in range(3))
    for name, adapter in given.items():
        inject(getattr(trained, name), adapter)
        write_lora(tmp_path / NAMES[name], adapter)
    fresh.load_lora_weights(tmp_path, adapter_name="mine")
    if "transformer_2" in given:
        file = NAMES["transformer_2"]
        fresh.load_lora_weights(
            tmp_path, weight_name=file, adapter_name="mine", load_into_transformer_2=True
        )
    expected, found = sample(trained, model), sample(fresh, model)
    assert torch.equal(expected, found)
    assert not torch.equal(expected, sample(untouched, model))


def test_ranks_and_alphas_of_each_module_arrive(model: Pair, folder: Path, tmp_path: Path) -> None:
    """Also of names that end in another module's name."""
    mixed = random_adapter(model, rank=4, alpha=8.0).pairs() | {
        name: pair
        for name, pair in random_adapter(model, rank=2, alpha=3.0, seed=5).pairs().items()
        if not in_blocks(name)
    }
    trained, fresh = load(model, folder), load(model, folder)
    inject(trained.transformer, Adapter.of(mixed))
    write_lora(tmp_path / NAMES["transformer"], Adapter.of(mixed))
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(sample(trained, model), sample(fresh, model))


def test_diffusers_loads_our_comfyui_files_of_wan(tmp_path: Path) -> None:
    """To the rounding of alpha, which it multiplies into A."""
    write_tiny(tmp_path / "model", family=WAN21.family)
    adapter = random_adapter(WAN21, only=in_blocks, rank=4, alpha=8.0, biases=True)
    write_lora(tmp_path / NAMES["transformer"], adapter)
    write_comfyui(tmp_path / "comfyui.safetensors", adapter, family=WAN21.family)
    ours, theirs = load(WAN21, tmp_path / "model"), load(WAN21, tmp_path / "model")
    ours.load_lora_weights(tmp_path / NAMES["transformer"])
    theirs.load_lora_weights(tmp_path / "comfyui.safetensors")
    torch.testing.assert_close(sample(ours, WAN21), sample(theirs, WAN21), rtol=1e-5, atol=1e-5)
