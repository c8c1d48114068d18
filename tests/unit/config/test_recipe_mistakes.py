# SPDX-License-Identifier: Apache-2.0
"""A mistake in a recipe ends with exit code 2 and names file, key, value and fix."""

from pathlib import Path

import pytest

from fastvideo.cli import run
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError

RECIPE = """
model: {family: wan2.1, path: models/tiny}
clip: {num_frames: 9, height: 64, width: 64, fps: 8}
source: {kind: merged, path: data/clips}
shards: {path: data/shards}
run_dir: runs/test
train: {steps: 10, global_batch_size: 4}
"""

MISTAKES = [
    # (override, words the message must hold: key, value, fix)
    ("train.stpes=3", ["train.stpes", "3", "did you mean steps"]),
    ("trian.steps=3", ["trian", "did you mean train"]),
    ("train.optimizer.learning_rate=1", ["train.optimizer.learning_rate", "known keys here", "lr"]),
    ("train.steps=many", ["train.steps", "'many'", "valid integer"]),
    ("train.steps=0", ["train.steps", "0", "greater than 0"]),
    ("train.steps=2.5", ["train.steps", "2.5", "integer"]),
    ("train.steps=true", ["train.steps", "True", "integer"]),
    ("train.seed=-1", ["train.seed", "-1", "greater than or equal to 0"]),
    ("train.optimizer.lr=-1e-5", ["train.optimizer.lr", "-1e-05", "greater than 0"]),
    ("train.optimizer.lr=.nan", ["train.optimizer.lr", "nan", "finite"]),
    ("train.optimizer.betas=[0.9]", ["train.optimizer.betas", "missing"]),
    ("train.method.kind=fulll", ["train.method.kind", "'fulll'", "did you mean full"]),
    ("train.expert=high", ["train.expert=high", "wan2.1", "remove the key"]),
    ("train.micro_batch_size=3", ["micro_batch_size=3", "global_batch_size=4", "1, 2, 4"]),
    ("train.samples={}", ["train.samples", "validation.prompts", "run preprocess"]),
    ("train.method={kind: lora, rank: 0}", ["train.method.rank", "0", "greater than 0"]),
    ("train.method={kind: lora, dropout: 1}", ["train.method.dropout", "less than 1"]),
    (
        "train.method={kind: lora, targets: to_q}",
        ["train.method.targets", "'to_q' is no preset; write attention, blocks, or a list"],
    ),
    ("train.method={kind: lora, targets: []}", ["train.method.targets", "is empty"]),
    (
        "train.method={kind: lora, targets: ['blocks[']}",
        ["train.method.targets", "'blocks[' is no regular expression"],
    ),
    ("train.ema={decay: 1}", ["train.ema.decay", "less than 1"]),
    ("export.ema=true", ["export.ema", "set train.ema"]),
    ("export.comfyui=true", ["export.comfyui", "is for adapters", "remove the key"]),
    ("train.text_dropout=1.5", ["train.text_dropout", "1.5", "less than or equal to 1"]),
    ("clip.num_frames=10", ["clip.num_frames=10", "4n+1", "nearest is 9"]),
    ("clip.height=70", ["clip.height=70", "multiple of 16", "nearest is 64"]),
    ("clip.width=8", ["clip.width=8", "multiple of 16", "nearest is 16"]),
    ("clip.fps=0", ["clip.fps", "0", "greater than 0"]),
    ("clip.fps.rate=3", ["clip.fps", "8", "no keys in it"]),
    ("source.kind=zip", ["source.kind", "'zip'", "'merged'"]),
    ("source.max_failed=20", ["source.max_failed", "20", "less than or equal to 1"]),
    ("shards.dtype=float61", ["shards.dtype", "'float61'", "did you mean float16"]),
    ("shards.rows=-4", ["shards.rows", "-4", "greater than 0"]),
    ("model.family=wan", ["model.family", "'wan'", "wan2.1"]),
    ('model.path=""', ["model.path", "empty", "write a path"]),
    ("model=null", ["model", "None", "object"]),
    ("run_dir=null", ["run_dir", "None", "valid string"]),
    ("generate.guidance_scale=0.5", ["generate.guidance_scale", "0.5", "greater than or equal"]),
    ("train.steps", ["'train.steps'", "key.path=value"]),
    (".steps=3", ["'.steps=3'", "key.path=value"]),
    ("train.steps=[1", ["'train.steps=[1'", "not a YAML value"]),
]


@pytest.mark.parametrize(("override", "words"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_wrong_value_is_named_with_its_fix(
    override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert run(["status", str(path), override]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    for word in words:
        assert word in printed.err, printed.err
    assert "recipe.yaml: " in printed.err or f"override {override!r}" in printed.err


FILES = [
    ("", ["not a table"]),
    ("- a\n- b\n", ["list", "not a table"]),
    ("model: {family: wan2.1\n", ["line 2", "not valid YAML"]),
    (RECIPE + "clip: {fps: 3}\n", ["line 8", "'clip'", "written twice"]),
    ("model: {family: wan2.1, path: x}\n", ["source: is missing", "shards: is missing"]),
    ("a: \x00", ["not valid YAML"]),
]


@pytest.mark.parametrize(("text", "words"), FILES)
def test_a_wrong_file_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    for word in ["recipe.yaml", *words]:
        assert word in str(caught.value)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read: No such file"):
        Recipe.load(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Recipe.load(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"run_dir: caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        Recipe.load(latin)


@pytest.mark.parametrize("key", ["shards.path", "run_dir"])
def test_files_of_ours_do_not_go_into_a_data_set_of_hugging_face(key: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    source = f"source={{kind: hf, path: {tmp_path / 'clips'}}}"
    keys = [source, f"{key}={tmp_path / 'clips/ours'}"]
    Recipe.load(path, keys)  # no folder: an id on the Hub
    (tmp_path / "clips").mkdir()
    with pytest.raises(UserError, match=rf"{key}=.*: lies in source\.path=.* outside of it"):
        Recipe.load(path, keys)
    Recipe.load(path, [source, f"{key}={tmp_path / 'clips_ours'}"])


def test_several_mistakes_are_all_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(UserError) as caught:
        Recipe.load(path, ["train.steps=x", "clip.fps=y", "shards.row=3"])
    assert len(str(caught.value).splitlines()) == 3


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("steps: 10", "steps: 10, optimizer: {lr: 5e-5}"))
    assert Recipe.load(path).train.optimizer.lr == 5e-5


def test_changing_kind_starts_the_table_afresh(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = Recipe.load(path, ["train.schedule.kind=cosine", "train.schedule.warmup_steps=2"])
    assert recipe.train.schedule.warmup_steps == 2
    recipe = Recipe.load(path, ["train.schedule.warmup_steps=2", "train.schedule.kind=cosine"])
    assert recipe.train.schedule.warmup_steps == 0


def test_a_dumped_recipe_loads_equal_and_is_frozen(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = Recipe.load(path, ["train.optimizer.betas=[0.9, 0.95]", "run_dir=runs/ü x"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.dump(), encoding="utf-8")
    assert Recipe.load(copy) == recipe
    with pytest.raises(Exception, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]
