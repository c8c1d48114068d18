# SPDX-License-Identifier: Apache-2.0
"""What is asked of a pipeline, by recipe, prompt and model folder; what the export says of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastvideo import generate as sampling
from fastvideo import sampled
from fastvideo.errors import UserError
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.models.family import SamplerSettings, find_family
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.tiny_world import PAIRS, Pair, World, in_fork, make_world

LICENCE = {"license": "apache-2.0", "license_link": "LICENSE.txt"}
CHANGES = (
    "flow_shift=9",
    "num_inference_steps=3",
    "vae_tiling=true",
    "guidance_scale=2",
    "negative_prompt=blue",
    "seed=4",
)


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    """A job without clips: sampling the base model needs none."""
    return make_world(tmp_path, clips=0, model=tiny_model)


# ---------------------------------------------------------------- recipe


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_samples_anew(
    world: World, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "load", lambda *_: None)
    monkeypatch.setattr(sampling, "_sample", lambda *_: np.zeros((9, 32, 48, 3), np.uint8))
    recipe = world.load("generate.weights=base")
    assert generate(recipe)["made"] == 2
    assert generate(recipe)["made"] == 0
    assert generate(world.load("generate.weights=base", f"generate.{change}"))["made"] == 2


def test_settings_of_the_recipe_reach_the_pipeline(world: World) -> None:
    def load(*overrides: str) -> Any:
        recipe = world.load("generate.weights=base", *overrides)
        return sampled.load(recipe, sampled.find(recipe))

    plain = load()
    changed = load("generate.vae_tiling=true", "generate.flow_shift=9")
    assert (plain.vae.use_tiling, changed.vae.use_tiling) == (False, True)
    shifts = [pipe.scheduler.config.flow_shift for pipe in (plain, changed)]
    assert shifts == [3.0, 9.0]


# ---------------------------------------------------------------- prompt


def test_a_prompt_may_ask_for_its_own_size_and_steps(world: World) -> None:
    own = {"num_frames": 5, "height": 48, "num_inference_steps": 7}
    prompts = [{"caption": "x", **own}, "y"]
    (world.root / "prompts.json").write_text(json.dumps(prompts))
    asked, plain = sampling.requests(world.load())
    assert {name: asked[name] for name in (*own, "width")} == {**own, "width": 48}
    assert {name: plain[name] for name in own} == {
        "num_frames": 9,
        "height": 32,
        "num_inference_steps": 2,
    }


# ---------------------------------------------------------------- model folder


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_shift_is_that_of_the_models_own_sampler(pair: Pair, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_tiny(model, family=pair.family, task=pair.task)
    recipe = make_world(tmp_path, clips=0, model=model, pair=pair).load()
    shifts = {"hunyuan-video": 7.0, "wan2.2-ti2v-5b": 5.0}
    assert find_family(recipe).flow_shift(model) == shifts.get(pair.family, 3.0)


def test_a_conversion_of_wan21_is_sampled_without_the_boundary_it_carries(
    world: World, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.9}))
    settings = SamplerSettings(dtype="float32", device="cpu")
    family = find_family(world.load(f"model.path={model}"))
    pipeline = family.load_pipeline(model, settings=settings, transformers={})
    assert pipeline.config.boundary_ratio is None


# ---------------------------------------------------------------- card


def card_of(path: Path) -> dict[str, Any]:
    """The front matter."""
    _, head, _ = path.read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_an_export_has_the_licence_of_its_base_and_no_local_folder_as_base_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    head = {**LICENCE, "tags": ["another"], "base_model": "somebody/else"}
    (model / "README.md").write_text(f"---\n{yaml.safe_dump(head)}---\n# A base model\n")
    world = make_world(tmp_path, clips=2, model=model)

    def run() -> None:
        recipe = world.load("train.steps=1")
        preprocess(recipe)
        train(recipe)
        export(recipe)

    assert in_fork(run) == 0
    card = card_of(world.run_dir / "export/README.md")
    assert {name: card.get(name) for name in LICENCE} == LICENCE
    assert "base_model" not in card
    assert "another" not in card["tags"]


def test_an_export_of_another_method_is_refused(world: World) -> None:
    marker = RunDir(world.run_dir).export_marker
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"method": "lora"}))
    with pytest.raises(UserError, match=r"was exported with train\.method\.kind=lora.*says full"):
        generate(world.load())
