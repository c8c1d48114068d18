# SPDX-License-Identifier: Apache-2.0
"""Model folders as people keep them: linked, saved again, incomplete, exported before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from fastvideo import atomic
from fastvideo.data import encode
from fastvideo.errors import UserError
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.models import wan_encoders
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.tiny_world import Pair, World, fastvideo, in_fork, make_world

SHORT = ("train.steps=2", "train.heldout.every_steps=null")


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    """A job with a model of its own."""
    shutil.copytree(tiny_model, tmp_path / "model")
    return make_world(tmp_path, clips=2, model=tmp_path / "model")


def model_of(world: World) -> Path:
    return Path(world.load().model.path)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def finish(world: World, *overrides: str) -> None:
    recipe = world.load(*SHORT, *overrides)
    assert in_fork(lambda: [verb(recipe) for verb in (preprocess, train, export)]) == 0


def test_parts_that_are_links_to_shared_folders_are_exported_too(world: World) -> None:
    for part in ("text_encoder", "vae"):
        shared = world.root / "shared" / part
        shutil.copytree(model_of(world) / part, shared)
        shutil.rmtree(model_of(world) / part)
        (model_of(world) / part).symlink_to(shared)
    finish(world)
    exported = RunDir(world.run_dir).export
    assert (exported / "text_encoder/model.safetensors").is_file()
    WanPipeline.from_pretrained(exported)
    edit(world.root / "shared/vae/config.json", dropout=0.5)
    assert export(world.load(*SHORT))["ran"] is True, "a change behind a link counts"


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_weights_that_lack_a_tensor_are_refused(world: World, part: str) -> None:
    """The libraries put random numbers in their place and warn."""
    (file,) = (model_of(world) / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(name for name in tensors if tensors[name].ndim > 1)[-1]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    verbs = (preprocess, train) if part == "transformer" else (preprocess,)
    with pytest.raises(UserError, match=rf"weights in {part} lack \d tensors"):
        for verb in verbs:
            verb(world.load(*SHORT))


def test_a_base_that_was_saved_again_goes_on(world: World) -> None:
    finish(world)
    for part in ("transformer", "vae"):
        edit(model_of(world) / part / "config.json", _diffusers_version="9", _name_or_path="x")
    assert in_fork(lambda: train(world.load(*SHORT, "train.steps=3"))) == 0


def test_an_export_is_a_base_for_the_next_run(world: World) -> None:
    """Its encoders are those of the shards, its marker and card stay behind."""
    finish(world)
    exported = world.root / "second"
    shutil.copytree(RunDir(world.run_dir).export, exported)
    recipe = world.load(*SHORT, f"model.path={exported}", f"run_dir={world.root / 'next'}")
    assert preprocess(recipe)["filled"] == []
    assert in_fork(lambda: [verb(recipe) for verb in (train, export)]) == 0
    first, second = (
        atomic.read_json(RunDir(r).export_marker) for r in (world.run_dir, recipe.run_dir)
    )
    assert first["checkpoints"] != second["checkpoints"]
    card = (RunDir(recipe.run_dir).export / "README.md").read_text()
    assert str(exported) in card


def test_a_killed_export_leaves_the_one_before_or_none(world: World, tmp_path: Path) -> None:
    finish(world)
    log = tmp_path / "points"
    longer = world.load(*SHORT, "train.steps=3")
    assert in_fork(lambda: train(longer)) == 0
    before = atomic.read_json(RunDir(world.run_dir).export_marker)
    assert in_fork(lambda: export(longer), fault="export.marker.done", fault_log=log) == -9
    assert atomic.read_json(RunDir(world.run_dir).export_marker) == before, log.read_text()
    assert in_fork(lambda: export(longer)) == 0
    after = atomic.read_json(RunDir(world.run_dir).export_marker)
    assert after != before
    card = (RunDir(world.run_dir).export / "README.md").read_text()
    assert "| `transformer` | 3 |" in card
    leftovers = [p.name for p in world.run_dir.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_what_was_trained_is_exported_and_sampled_without_the_base_weights(world: World) -> None:
    finish(world)
    (model_of(world) / "transformer/diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(RunDir(world.run_dir).export)
    recipe = world.load(*SHORT, "generate.weights=checkpoint")
    assert in_fork(lambda: [verb(recipe) for verb in (export, generate)]) == 0
    assert len(list(RunDir(world.run_dir).generated("checkpoint").glob("*.mp4"))) == 2
    WanPipeline.from_pretrained(RunDir(world.run_dir).export)


def test_two_exports_at_once_are_refused(world: World) -> None:
    finish(world)
    with (
        atomic.alone(world.run_dir / "export.lock", busy=""),
        pytest.raises(UserError, match="another process exports there"),
    ):
        export(world.load(*SHORT, "export.max_shard_gib=1"))


def test_text_that_is_not_finite_stops_preprocessing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = wan_encoders.WanEncoders.encode_text

    def broken(self: Any, captions: Any) -> Any:
        return [
            type(text)(torch.full_like(text.embedding, torch.nan))
            for text in encode(self, captions)
        ]

    monkeypatch.setattr(wan_encoders.WanEncoders, "encode_text", broken)
    with pytest.raises(
        UserError, match=r"text encoder made values that are not finite.*text_dtype"
    ):
        preprocess(world.load())


def test_both_sizes_of_a_model_share_their_shards(tmp_path: Path, tiny_model: Path) -> None:
    """What differs between repositories of one family is the transformer."""
    world = make_world(tmp_path, clips=2, model=tiny_model)
    preprocess(world.load())
    other = tmp_path / "other"
    write_tiny(other)
    edit(other / "transformer/config.json", num_layers=2, _diffusers_version="9")
    assert preprocess(world.load(f"model.path={other}"))["filled"] == []


def test_image_to_video_of_one_frame_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    pair = Pair("wan2.2-ti2v-5b", "i2v", width=64)
    world = make_world(tmp_path, clips=1, model=tiny_model, pair=pair)
    with pytest.raises(UserError, match=r"clip\.num_frames=1: .* the least is 5"):
        world.load("clip.num_frames=1")


def test_a_model_in_the_run_directory_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    world = make_world(tmp_path, clips=1, model=tiny_model)
    with pytest.raises(UserError, match=r"model\.path=.*lies in run_dir"):
        world.load(f"model.path={world.run_dir}/export")


def test_a_tiny_model_of_another_kind_does_not_pass_for_the_wanted_one(
    tmp_path: Path, tiny_model: Path
) -> None:
    world = make_world(tmp_path, clips=1, model=tiny_model)
    done = fastvideo("tiny", world, "model.task=i2v")
    assert done.code == 2 and "write model.task: t2v" in done.err
    assert fastvideo("tiny", world).code == 0


def test_a_tiny_model_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    world = make_world(tmp_path, clips=1, model=Path("models/tiny_none"))
    done = fastvideo("preprocess", world)
    assert done.code == 2 and "`fastvideo tiny`" in done.err and "Hub" not in done.err


def test_models_of_two_families_do_not_share_a_run(world: World, tmp_path: Path) -> None:
    finish(world)
    other = tmp_path / "a14b"
    write_tiny(other, family="wan2.2-a14b")
    family = ("model.family=wan2.2-a14b", f"model.path={other}", f"shards.path={tmp_path / 's'}")
    recipe = world.load(*SHORT, *family, "train.expert=low")
    preprocess(recipe)
    with pytest.raises(UserError, match=r"trained from a wan2\.1 model.*another run_dir"):
        train(recipe)


def test_clips_that_are_all_unusable_are_said_before_encoders_load(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(recipe: Any) -> None:
        raise AssertionError("encoders were loaded")

    monkeypatch.setattr(encode, "load_encoders", never)
    with pytest.raises(UserError, match="not one of 2 clips can be used"):
        preprocess(world.load("source.filters.min_height=9999"))


def test_the_card_has_the_recipe_that_was_trained_with(world: World) -> None:
    finish(world)
    export(world.load(*SHORT, "train.optimizer.lr=7", "export.components=copy"))
    card = (RunDir(world.run_dir).export / "README.md").read_text()
    assert "lr: 0.001" in card and "lr: 7" not in card
