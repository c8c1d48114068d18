# SPDX-License-Identifier: Apache-2.0
"""Wrong folders, damaged models and foreign files: exit code 2, one message, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvideo.arguments import parse_shards
from fastvideo.cli import run
from fastvideo.errors import UserError
from tests.tiny_world import World, fastvideo, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """Shards are there, nothing is trained."""
    world = make_world(tmp_path_factory.mktemp("mistakes"), clips=2, model=tiny_model)
    assert fastvideo("preprocess", world).code == 0
    return world


def assert_refused(world: World, verb: str, *overrides: str, words: list[str]) -> None:
    done = fastvideo(verb, world, *overrides)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


def without(folder: str) -> Callable[[Path], object]:
    return lambda model: shutil.rmtree(model / folder)


def cut(name: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:5000])


def edit(name: str, **values: object) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


MODELS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "no vae": ("preprocess", without("vae"), ["vae/config.json"]),
    "no text encoder": ("preprocess", without("text_encoder"), ["text_encoder/"]),
    "no tokenizer": ("preprocess", without("tokenizer"), ["tokenizer/"]),
    "no index": ("preprocess", lambda m: (m / "model_index.json").unlink(), ["model_index.json"]),
    "cut vae": (
        "preprocess",
        cut("vae/diffusion_pytorch_model.safetensors"),
        ["vae", "fetch it again"],
    ),
    "foreign vae": ("preprocess", edit("vae/config.json", latents_mean=None), ["vae"]),
    "config is no JSON": (
        "preprocess",
        lambda m: (m / "vae/config.json").write_text("{"),
        ["vae/config.json is damaged"],
    ),
    "no transformer": ("train", without("transformer"), ["transformer/config.json"]),
    "cut transformer": (
        "train",
        cut("transformer/diffusion_pytorch_model.safetensors"),
        ["transformer", "fetch it again"],
    ),
    "no scheduler": ("train", without("scheduler"), ["scheduler/scheduler_config.json"]),
    "Wan2.2": (
        "preprocess",
        edit("model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
        ["Wan2.2"],
    ),
    "image to video": (
        "preprocess",
        edit("transformer/config.json", in_channels=36, image_dim=1280),
        ["36 channels", "image-to-video"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_named(
    name: str, world: World, tiny_model: Path, tmp_path: Path
) -> None:
    verb, spoil, words = MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    spoil(model)
    assert_refused(
        world,
        verb,
        f"model.path={model}",
        f"run_dir={tmp_path / 'run'}",
        *([f"shards.path={tmp_path / 'shards'}"] if verb == "preprocess" else []),
        words=[str(model), *words],
    )


@pytest.mark.parametrize("path", ["my models/wan", "models/tïny", "a/b/c", "../up/wan", "nothing"])
def test_a_model_path_that_is_neither_a_folder_nor_an_id_is_named(world: World, path: str) -> None:
    assert_refused(world, "preprocess", f"model.path={path}", words=[path, "no such folder"])


def test_paths_that_are_files_are_named(world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for verb, override in (
        ("preprocess", f"shards.path={file}"),
        ("train", f"run_dir={file}"),
        ("train", f"run_dir={file}/x"),
        ("preprocess", f"source.path={file}"),
        ("tiny", f"model.path={file}/x"),
    ):
        assert_refused(world, verb, override, words=[str(file)])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('run_dir=""', ["run_dir", "empty"]),
        ('run_dir="a\\0b"', ["run_dir", "NUL"]),
        ("train.steps=!!binary aGk=", ["override", "not know"]),
        ("generate.negative_prompt=&x [*x]", ["override"]),
        ("train.steps=" + "9" * 5000, ["override"]),
        ("train.steps=" + "[" * 3000, ["override"]),
    ],
)
def test_values_that_no_config_can_hold_are_refused(
    world: World, override: str, words: list[str]
) -> None:
    assert_refused(world, "status", override, words=words)


def test_a_home_folder_is_expanded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/home")
    assert world.load("run_dir=~/runs").run_dir == Path("/nowhere/home/runs")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "[3]", '[{"caption": 3}]', "[" * 100_000, '[{"captoin": "x"}]']
)
def test_prompt_files_of_wrong_forms_are_named_before_anything_runs(
    world: World, tmp_path: Path, content: str
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(content)
    assert_refused(world, "run", f"generate.prompts={prompts}", words=[str(prompts)])


def test_a_prompt_of_a_size_the_model_cannot_make_is_named(world: World, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text('["fine", {"caption": "x", "height": 50}]')
    words = [f"{prompts}: data[1]", "height=50", "nearest is 48"]
    assert_refused(world, "generate", f"generate.prompts={prompts}", words=words)


def test_a_clip_that_went_away_after_planning_is_named(
    world: World, tmp_path: Path, tiny_model: Path
) -> None:
    other = make_world(tmp_path / "other", clips=2, model=tiny_model)
    assert fastvideo("preprocess", other, "--manifest-only").code == 0
    (other.root / "clips/videos/1.mp4").unlink()
    assert_refused(other, "preprocess", "--shards", "0", words=["1.mp4", "is gone"])


@pytest.mark.parametrize("text", ["", "x", "1-", "3-1", "-1", "0-9999999999", "1,,2"])
def test_shard_lists_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shards"):
        parse_shards(text)


def test_shard_lists_are_numbers_and_ranges() -> None:
    assert parse_shards("0-3,7, 2") == [0, 1, 2, 3, 7]


def test_an_empty_shard_list_does_not_mean_all(world: World) -> None:
    assert_refused(world, "preprocess", "--shards", "", words=["--shards"])


def test_a_toy_does_not_stand_in_for_a_model_of_the_hub(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert_refused(world, "tiny", f"model.path={name}", words=[name, "Hub"])
    assert not (tmp_path / "Wan-AI").exists()


def test_options_of_other_verbs_are_refused(world: World) -> None:
    for verb, option in (("train", "--clips"), ("status", "--force"), ("export", "--shards=1")):
        assert_refused(world, verb, option, words=[option.split("=")[0], "belongs to"])


def test_unknown_verbs_and_no_verb_say_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["trian", "recipe.yaml"])
    assert caught.value.code == 2
    assert "preprocess" in capsys.readouterr().err


def test_a_foreign_folder_among_the_checkpoints_is_no_checkpoint(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "train/transformer/checkpoints/step-old_best").mkdir(parents=True)
    done = fastvideo("status", world, f"run_dir={tmp_path}", "--json")
    assert json.loads(done.out)["train"]["transformer"]["checkpoints"] == []


def test_the_ledger_as_json_is_a_row_per_line(world: World) -> None:
    done = fastvideo("status", world, "--clips", "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["id"], row["state"]) for row in rows] == [
        ("0.mp4", "encoded"),
        ("1.mp4", "encoded"),
    ]
