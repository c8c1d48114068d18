# SPDX-License-Identifier: Apache-2.0
"""``generate.loras``: what plain diffusers gives, sampled anew when they change, refused early."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvideo import generate as sampling
from fastvideo import sampled
from fastvideo.errors import UserError
from fastvideo.generate import generate
from fastvideo.models.lora_file import write_comfyui, write_lora
from fastvideo.models.tiny import write_tiny
from fastvideo.state import LORA_FILES
from tests.lora_files import in_blocks, load, random_adapter, sample
from tests.tiny_world import WAN21, Pair, World, make_world

A14B = Pair("wan2.2-a14b")
BASE = "generate.weights=base"


def world_of(root: Path, pair: Pair) -> World:
    model = root / "model"
    write_tiny(model, family=pair.family, task=pair.task)
    return make_world(root, clips=0, model=model, pair=pair)


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    return make_world(tmp_path, clips=0, model=tiny_model)


def pipeline(world: World, *overrides: str) -> Any:
    """As ``generate`` loads it."""
    recipe = world.load(BASE, *overrides)
    return sampled.load(recipe, sampled.find(recipe))


@pytest.mark.parametrize("pair", [Pair(task="i2v"), A14B, Pair("hunyuan-video")], ids=str)
def test_two_loras_with_scales_are_what_plain_diffusers_gives(pair: Pair, tmp_path: Path) -> None:
    """Bit for bit; a folder, and a file that says what it is for."""
    world, experts = world_of(tmp_path, pair), "a14b" in pair.family
    names = ("transformer", "transformer_2") if experts else ("transformer",)
    for seed, name in enumerate(names):
        write_lora(tmp_path / "one" / LORA_FILES[name], random_adapter(pair, alpha=6.0, seed=seed))
    write_lora(tmp_path / "other.safetensors", random_adapter(pair, rank=2, alpha=1.0, seed=7))
    last = f"{{path: {tmp_path}/other.safetensors, scale: -0.5, transformer: {names[-1]}}}"
    found = pipeline(world, f"generate.loras=[{{path: {tmp_path}/one, scale: 0.7}}, {last}]")

    plain = load(pair, world.root / "model")
    plain.load_lora_weights(tmp_path / "one", adapter_name="one")
    if experts:
        plain.load_lora_weights(
            tmp_path / "one",
            weight_name=LORA_FILES["transformer_2"],
            adapter_name="one",
            load_into_transformer_2=True,
        )
    into = {"load_into_transformer_2": True} if experts else {}
    plain.load_lora_weights(tmp_path / "other.safetensors", adapter_name="other", **into)
    plain.transformer.set_adapters("one", 0.7)
    getattr(plain, names[-1]).set_adapters(["one", "other"], [0.7, -0.5])
    assert torch.equal(sample(found, pair), sample(plain, pair))
    assert not torch.equal(sample(found, pair), sample(pipeline(world), pair))


def test_loras_in_bfloat16_are_what_plain_diffusers_gives(world: World) -> None:
    import diffusers

    file = world.root / "x.safetensors"
    write_lora(file, random_adapter(WAN21, alpha=6.0))
    found = pipeline(world, f"generate.loras=[{{path: {file}}}]", "generate.dtype=bfloat16")
    plain = diffusers.WanPipeline.from_pretrained(world.load().model.path, dtype=torch.bfloat16)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(file)
    assert torch.equal(sample(found, WAN21), sample(plain, WAN21))


def test_files_of_comfyui_give_the_same(world: World) -> None:
    ours, theirs = (world.root / f"{name}.safetensors" for name in ("ours", "theirs"))
    adapter = random_adapter(WAN21, only=in_blocks)
    write_lora(ours, adapter)
    write_comfyui(theirs, adapter, family=WAN21.family)
    one, other = (pipeline(world, f"generate.loras=[{{path: {file}}}]") for file in (ours, theirs))
    assert torch.equal(sample(one, WAN21), sample(other, WAN21))


def test_a_changed_lora_samples_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "load", lambda *_: None)
    monkeypatch.setattr(sampling, "_sample", lambda *_: np.zeros((9, 32, 48, 3), np.uint8))
    file = world.root / "x.safetensors"

    def made(*overrides: str) -> int:
        count: int = generate(world.load(BASE, *overrides))["made"]
        return count

    write_lora(file, random_adapter(WAN21))
    with_lora = f"generate.loras=[{{path: {file}}}]"
    assert [made(), made(), made(with_lora), made(with_lora)] == [2, 0, 2, 0]
    assert made(f"generate.loras=[{{path: {file}, scale: 0.5}}]") == 2
    assert made(with_lora) == 2
    write_lora(file, random_adapter(WAN21, seed=1))
    assert [made(with_lora), made(with_lora)] == [2, 0]


def test_videos_are_made_and_say_with_which_loras(world: World) -> None:
    file = world.root / "x.safetensors"
    write_lora(file, random_adapter(WAN21))
    videos = []
    for number, overrides in enumerate(((), (f"generate.loras=[{{path: {file}}}]",))):
        recipe = world.load(BASE, f"run_dir={world.root / str(number)}", *overrides)
        videos.append(Path(generate(recipe)["videos"][0]))
    assert videos[0].read_bytes() != videos[1].read_bytes()
    assert '"transformer": "transformer"' in videos[1].with_suffix(".json").read_text()
    assert "loras" not in videos[0].with_suffix(".json").read_text()


def test_loras_are_added_to_an_export_as_well(world: World, tiny_model: Path) -> None:
    """Here the base model itself stands in for one."""
    file = world.root / "x.safetensors"
    write_lora(file, random_adapter(WAN21))
    with_lora = f"generate.loras=[{{path: {file}}}]"
    (base, _) = generate(world.load(BASE, with_lora))["videos"]
    shutil.copytree(tiny_model, world.run_dir / "export")
    (world.run_dir / "export/fastvideo.json").write_text("{}")
    (exported, _) = generate(world.load(with_lora))["videos"]
    assert exported != base and Path(exported).read_bytes() == Path(base).read_bytes()


def test_a_lora_of_another_model_is_refused_before_torch_is_loaded(world: World) -> None:
    file = world.root / "x.safetensors"
    write_lora(file, random_adapter(Pair("hunyuan-video")))
    code = (
        "import sys; from fastvideo.cli import run; code = run(sys.argv[1:]);"
        "print('torch' in sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "generate", str(world.recipe), BASE]
    done = subprocess.run(
        [*command, f"generate.loras=[{{path: {file}}}]"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert f"generate.loras[0]: {file} for transformer: does not fit the model" in done.stderr


MISTAKES = {
    "{{path: {root}/none.safetensors}}": r"loras\[0\]: .*none.safetensors: there is no such file",
    "{{path: {root}}}": r"generate.loras\[0\]: .* holds no pytorch_lora_weights",
    "{{path: {root}/two}}": "pytorch_lora_weights_2.safetensors for a model with two",
    "{{path: {root}/x.safetensors, transformer: transformer_2}}": "has one transformer; remove",
    "{{path: {root}/prompts.json}}": "prompts.json: is no safetensors file",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_a_run_begins(world: World, mistake: str) -> None:
    for file in ("x.safetensors", *(f"two/{name}" for name in LORA_FILES.values())):
        write_lora(world.root / file, random_adapter(WAN21))
    with pytest.raises(UserError, match=MISTAKES[mistake]):
        sampling.requests(world.load(f"generate.loras=[{mistake.format(root=world.root)}]"))


def test_a_file_for_a14b_says_for_which_expert_it_is(tmp_path: Path) -> None:
    world = world_of(tmp_path, A14B)
    write_lora(tmp_path / "x.safetensors", random_adapter(A14B))
    lora = f"path: {tmp_path / 'x.safetensors'}"
    with pytest.raises(UserError, match="does not say for which it is, transformer and trans"):
        sampling.requests(world.load(f"generate.loras=[{{{lora}}}]"))
    (asked, _) = sampling.requests(
        world.load(f"generate.loras=[{{{lora}, transformer: transformer_2}}]")
    )
    assert asked["loras"][0]["transformer"] == "transformer_2"
