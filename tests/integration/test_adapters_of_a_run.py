# SPDX-License-Identifier: Apache-2.0
"""Adapters from training to sampling: whose they are, what belongs to them, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo import sampled
from fastvideo.errors import UserError
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.models.lora_file import read_lora
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import LORA_FILES, NORM_FILES, RunDir
from fastvideo.train.launcher import train
from tests.tiny_world import Pair, World, fastvideo, in_fork, make_world

LORA = (
    "train.method={kind: lora, rank: 3, alpha: 6, norms: true}",
    "train.optimizer.lr=1e-2",
    "train.heldout.every_steps=null",
    "train.steps=2",
)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two steps of adapters and norms."""
    world = make_world(tmp_path_factory.mktemp("job"), clips=2, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    assert in_fork(lambda: train(world.load(*LORA))) == 0
    return world


@pytest.fixture
def other_model(trained: World, tmp_path: Path) -> Path:
    """The model after another finetune: the same files, other numbers."""
    path = tmp_path / "other"
    shutil.copytree(trained.load().model.path, path)
    (file,) = (path / "transformer").glob("*.safetensors")
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return path


def test_the_norms_of_a_run_are_exported_and_sampled(trained: World) -> None:
    assert export(trained.load(*LORA))["ran"]
    folder = RunDir(trained.run_dir).export
    norms = load_file(folder / NORM_FILES["transformer"])
    base = load_file(next((Path(trained.load().model.path) / "transformer").glob("*.safetensors")))
    assert norms and all(not torch.equal(tensor, base[name]) for name, tensor in norms.items())
    assert not any("norm" in name for name in read_lora(folder / LORA_FILES["transformer"]).tensors)
    found = {}
    for weights in ("export", "checkpoint"):
        recipe = trained.load(*LORA, f"generate.weights={weights}")
        pipeline: Any = sampled.load(recipe, sampled.find(recipe))
        parameters = dict(pipeline.transformer.named_parameters())
        assert all(torch.equal(parameters[name], tensor) for name, tensor in norms.items())
        found[weights] = Path(generate(recipe)["videos"][0]).read_bytes()
    assert found["export"] == found["checkpoint"]


def test_adapters_are_applied_before_the_pipeline_is_offloaded(
    trained: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks of offloading leave parameters on the meta device, where a copy changes nothing."""
    from fastvideo.models import parts

    seen: list[bool] = []

    def set_up(pipeline: Any, settings: Any) -> Any:
        seen.append(bool(pipeline.transformer.peft_config))
        return pipeline

    monkeypatch.setattr(parts, "_set_up", set_up)
    recipe = trained.load(*LORA, "generate.weights=checkpoint")
    sampled.load(recipe, sampled.find(recipe))
    assert seen == [True]


@pytest.mark.parametrize("verb", ["train", "export", "generate"])
def test_another_base_model_is_refused(
    trained: World, other_model: Path, tmp_path: Path, verb: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    more = ("train.steps=3", "generate.weights=checkpoint", f"run_dir={run}")
    done = fastvideo(verb, trained, *LORA, *more, f"model.path={other_model}")
    assert done.code == 2
    assert "the weights of the base model, which adapters belong to, are others" in done.err


def test_an_export_is_not_sampled_on_another_base_model(
    trained: World, other_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    export(trained.load(*LORA, f"run_dir={run}"))
    with pytest.raises(UserError, match="weights of the base model"):
        generate(trained.load(*LORA, f"run_dir={run}", f"model.path={other_model}"))


def test_a_copy_of_the_base_model_goes_on(trained: World, tmp_path: Path) -> None:
    shutil.copytree(trained.load().model.path, tmp_path / "copy")
    shutil.copytree(trained.run_dir, tmp_path / "run")
    more = (f"run_dir={tmp_path}/run", f"model.path={tmp_path}/copy", "train.steps=3")
    assert in_fork(lambda: train(trained.load(*LORA, *more))) == 0


def test_experts_may_have_adapters_of_their_own(tmp_path: Path) -> None:
    """And of averages only one; videos while the second trains use the first as it was made."""
    pair = Pair("wan2.2-a14b")
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    world = make_world(tmp_path, clips=2, model=tmp_path / "model", pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    high = ("train.expert=high", *LORA)
    low = (
        "train.expert=low",
        *LORA[1:],
        "train.method={kind: lora, rank: 2, targets: attention}",
        "train.ema={decay: 0.5}",
        "train.samples={every_steps: 2, max_prompts: 1}",
    )
    for options in (high, low):
        done = fastvideo("train", world, *options)
        assert done.code == 0, done.err
    assert "was trained without train.ema; its last weights are taken" in done.err
    recipe = world.load(*low)
    assert export(recipe)["ran"]
    folder = RunDir(world.run_dir).export
    ranks = [read_lora(folder / name).rank for name in LORA_FILES.values()]
    assert ranks == [3, 2]
    assert (folder / NORM_FILES["transformer"]).exists()
    assert not (folder / NORM_FILES["transformer_2"]).exists()
    assert (folder / "README.md").read_text().count("strict=False") == 1
    assert generate(recipe)["made"] == 2


def test_a_forced_run_samples_too(trained: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run_dir, run)
    more = (f"run_dir={run}", "train.method.alpha=3", "train.steps=3")
    samples = "train.samples={every_steps: 3, max_prompts: 1}"
    refused = fastvideo("train", trained, *LORA, *more, samples)
    assert refused.code == 2 and "train.method.alpha: 6.0 -> 3.0" in refused.err
    done = fastvideo("train", trained, *LORA, *more, samples, "--force")
    assert done.code == 0, done.err
    assert (RunDir(run).training().sampled(3) / "0000.mp4").exists()
