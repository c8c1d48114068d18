# SPDX-License-Identifier: Apache-2.0
"""Our LoRA files in pipelines of diffusers: the same latents, bit for bit, as the adapter gave."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastvideo.models.lora_file import Adapter, write_comfyui, write_lora
from fastvideo.models.tiny import write_tiny
from fastvideo.state import LORA_FILES
from tests.lora_files import in_blocks, inject, load, random_adapter, sample
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
        write_lora(tmp_path / LORA_FILES[name], adapter)
    fresh.load_lora_weights(tmp_path, adapter_name="mine")
    if "transformer_2" in given:
        file = LORA_FILES["transformer_2"]
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
    write_lora(tmp_path / LORA_FILES["transformer"], Adapter.of(mixed))
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(sample(trained, model), sample(fresh, model))


def test_diffusers_loads_our_comfyui_files_of_wan(tmp_path: Path) -> None:
    """To the rounding of alpha, which it multiplies into A."""
    write_tiny(tmp_path / "model", family=WAN21.family)
    adapter = random_adapter(WAN21, only=in_blocks, rank=4, alpha=8.0, biases=True)
    write_lora(tmp_path / LORA_FILES["transformer"], adapter)
    write_comfyui(tmp_path / "comfyui.safetensors", adapter, family=WAN21.family)
    ours, theirs = load(WAN21, tmp_path / "model"), load(WAN21, tmp_path / "model")
    ours.load_lora_weights(tmp_path / LORA_FILES["transformer"])
    theirs.load_lora_weights(tmp_path / "comfyui.safetensors")
    torch.testing.assert_close(sample(ours, WAN21), sample(theirs, WAN21), rtol=1e-5, atol=1e-5)
