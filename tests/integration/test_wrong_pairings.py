# SPDX-License-Identifier: Apache-2.0
"""Models, recipes, shards and prompts that do not belong together: exit code 2, without torch."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo.export import export
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore, complete_plan
from fastvideo.train import inputs
from fastvideo.train.launcher import train
from tests.tiny_world import PAIRS, Pair, World, in_fork, make_world

WAN21, WAN21_I2V, A14B, A14B_I2V, TI2V, TI2V_I2V, HUNYUAN = map(str, PAIRS)
BY_NAME = {str(pair): pair for pair in PAIRS}
MODELS = {name: pair for name, pair in BY_NAME.items() if name != TI2V_I2V}
"""One folder serves both tasks of TI2V-5B."""
SINGLE = (WAN21, WAN21_I2V, TI2V, HUNYUAN)

SERVER = """
import contextlib, io, json, os, sys, traceback
import fastvideo.export, fastvideo.generate, fastvideo.preprocess, fastvideo.train.launcher
from fastvideo.cli import run
for line in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run(json.loads(line))
        except BaseException:
            code = 1
            traceback.print_exc()
    heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
    print(json.dumps([code, errors.getvalue(), sorted(heavy)]), flush=True)
    os._exit(0)
"""
"""Runs each command in a fork of a process that has not loaded torch."""


@dataclass(frozen=True)
class Lab:
    """Preprocessed jobs by pair, and a run of Wan2.1 that was trained and exported."""

    root: Path
    worlds: dict[str, World]
    asks: IO[str]
    answers: IO[str]

    @property
    def trained(self) -> Path:
        return self.root / "trained"

    def model(self, name: str) -> Path:
        return self.root / "models" / name

    def shards(self, name: str) -> str:
        return f"shards.path={self.worlds[name].shards}"

    def refusal(self, name: str, verb: str, *overrides: str) -> str:
        """The message of a command that ended with 2, wrote nothing and loaded no torch."""
        before = tree(self.root)
        argv = [verb, str(self.worlds[name].recipe), f"run_dir={self.trained}", *overrides]
        self.asks.write(json.dumps(argv) + "\n")
        self.asks.flush()
        code, message, heavy = json.loads(self.answers.readline())
        assert code == 2, message
        assert f"fastvideo {verb}: " in message and "Traceback" not in message
        assert heavy == []
        assert tree(self.root) == before
        return str(message)


def tree(root: Path) -> dict[Path, int]:
    """Files and folders with their times, but for the cache of hashes."""
    found = (path for path in root.rglob("*") if path.name != "hashes.json")
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()} | {
        path: 0 for path in root.rglob("*/")
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("pairings")
    for name, pair in MODELS.items():
        write_tiny(root / "models" / name, family=pair.family, task=pair.task)
    (root / "models" / TI2V_I2V).symlink_to(root / "models" / TI2V)
    worlds = {
        name: make_world(root / name, clips=1, model=root / "models" / name, pair=pair)
        for name, pair in BY_NAME.items()
    }

    def prepare() -> None:
        for world in worlds.values():
            preprocess(world.load())
        recipe = worlds[WAN21].load(f"run_dir={root / 'trained'}", "train.steps=1")
        train(recipe)
        export(recipe)

    assert in_fork(prepare) == 0
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        yield Lab(root, worlds, server.stdin, server.stdout)


def says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------- recipe and checkpoint


@pytest.mark.parametrize("verb", ["preprocess", "train", "export", "generate"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_checkpoint_of_another_family_or_task_is_refused(lab: Lab, name: str, verb: str) -> None:
    pair = BY_NAME[name]
    others = [other for other in MODELS if not fits(MODELS[other], pair)]
    assert len(others) == 5
    for other in others:
        found, path = MODELS[other], lab.model(other)
        message = lab.refusal(name, verb, f"model.path={path}")
        says(message, f"model.path={path}: is a ", "or give ")
        if found.family != pair.family:
            says(message, f"a {found.family} model", f"the recipe says model.family={pair.family}")
            says(message, f"write model.family: {found.family}")
        else:
            says(message, f"model for {found.task}", f"the recipe says model.task={pair.task}")
            says(message, f"write model.task: {found.task}", f"a {pair.task} model")


def fits(model: Pair, recipe: Pair) -> bool:
    return model.family == recipe.family and (model.task == recipe.task or "ti2v" in model.family)


@pytest.mark.parametrize("weights", ["base", "checkpoint", "export"])
def test_sampling_refuses_a_wrong_checkpoint_whatever_the_weights(lab: Lab, weights: str) -> None:
    overrides = (f"model.path={lab.model(WAN21_I2V)}", f"generate.weights={weights}")
    says(lab.refusal(WAN21, "generate", *overrides), "is a model for i2v", "model.task=t2v")


@pytest.mark.parametrize("verb", ["preprocess", "train", "export", "generate"])
def test_a_pipeline_that_is_not_trained_here_is_refused_by_every_verb(
    lab: Lab, tmp_path: Path, verb: str
) -> None:
    model = copy(lab.model(WAN21), tmp_path / "model")
    edit(model / "model_index.json", _class_name="WanVACEPipeline")
    message = lab.refusal(WAN21, verb, f"model.path={model}")
    says(message, f"model.path={model}: is a WanVACEPipeline", "give the folder of a Wan2.1")


@pytest.mark.parametrize(("name", "part"), [(WAN21_I2V, "image_encoder"), (HUNYUAN, "tokenizer_2")])
def test_a_folder_without_an_encoder_that_the_model_needs_is_refused(
    lab: Lab, tmp_path: Path, name: str, part: str
) -> None:
    model = copy(lab.model(name), tmp_path / "model")
    shutil.rmtree(model / part)
    message = lab.refusal(name, "preprocess", f"model.path={model}")
    says(message, f"model.path={model}: has no {part}/", "give a whole diffusers folder")


def copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------- model and shards


@pytest.mark.parametrize(
    ("name", "shards", "missing"),
    [
        (WAN21_I2V, WAN21, "no clip_feature and no first_frame_latent"),
        (A14B_I2V, A14B, "no first_frame_latent"),
    ],
)
def test_shards_without_the_columns_of_image_to_video_are_refused(
    lab: Lab, tmp_path: Path, name: str, shards: str, missing: str
) -> None:
    new = f"run_dir={tmp_path}"
    message = lab.refusal(name, "train", lab.shards(shards), new)
    says(message, str(lab.worlds[shards].shards), f"holds {missing}, which", "as i2v")
    says(message, str(lab.model(name)), "run preprocess", "or use the model")
    assert list(tmp_path.iterdir()) == []


def test_shards_without_clip_features_alone_are_refused(lab: Lab, tmp_path: Path) -> None:
    """Made with a model of the same family and task that has none."""
    model = copy(lab.model(WAN21_I2V), tmp_path / "model")
    edit(model / "transformer/config.json", image_dim=None)
    shards = f"shards.path={tmp_path / 'shards'}"
    recipe = lab.worlds[WAN21_I2V].load(f"model.path={model}", shards)
    assert in_fork(lambda: preprocess(recipe)) == 0
    message = lab.refusal(WAN21_I2V, "train", shards)
    says(message, f"{tmp_path / 'shards'}: holds no clip_feature, which", "run preprocess")


def test_shards_with_more_than_a_model_needs_are_fine(lab: Lab) -> None:
    """Image-to-video shards hold what text-to-video needs, of the same VAE and text encoder."""
    for name, shards in ((WAN21, WAN21_I2V), (A14B, A14B_I2V), (TI2V_I2V, TI2V), (TI2V, TI2V_I2V)):
        checked(lab, name, lab.shards(shards))


def checked(lab: Lab, name: str, *overrides: str) -> None:
    """What training checks before it begins."""
    recipe = lab.worlds[name].load(*overrides)
    store = ShardStore(recipe.shards.path)
    inputs.facts(recipe, store, complete_plan(store))


def test_shards_of_another_family_are_refused(lab: Lab, tmp_path: Path) -> None:
    families = (WAN21_I2V, A14B_I2V, TI2V, HUNYUAN)
    for name, shards in itertools.permutations(families, 2):
        message = lab.refusal(name, "train", lab.shards(shards), f"run_dir={tmp_path}")
        says(message, f"{lab.worlds[shards].shards}: was encoded with family ")
        says(message, f"{BY_NAME[shards].family!r}, the recipe says {BY_NAME[name].family!r}")
        says(message, "run preprocess, or use the recipe")


def other_weights(model: Path) -> str:
    path = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    path.unlink()
    save_file({**tensors, name: torch.nextafter(tensors[name], torch.tensor(9.0))}, path)
    return path.name


def other_config(model: Path) -> str:
    path = model / "vae/config.json"
    key = "latents_mean" if "latents_mean" in json.loads(path.read_text()) else "scaling_factor"
    edit(path, **{key: [0.5] * 48 if key == "latents_mean" else 0.5})
    return path.name


@pytest.mark.parametrize("change", [other_weights, other_config])
@pytest.mark.parametrize("name", [WAN21, A14B_I2V, TI2V, HUNYUAN])
def test_shards_of_another_vae_are_refused(
    lab: Lab, tmp_path: Path, name: str, change: Callable[[Path], str]
) -> None:
    model = copy(lab.model(name), tmp_path / "model")
    file = change(model)
    new = (f"model.path={model}", f"run_dir={tmp_path / 'run'}")
    message = lab.refusal(name, "train", *new)
    says(message, f"{lab.worlds[name].shards}: was encoded with another VAE than")
    says(message, str(model / "vae" / file), "run preprocess, or use the model.path")
    assert not (tmp_path / "run").exists()


def test_the_same_vae_elsewhere_or_none_is_fine(lab: Lab, tmp_path: Path) -> None:
    model = copy(lab.model(WAN21), tmp_path / "model")
    checked(lab, WAN21, f"model.path={model}")
    shutil.rmtree(model / "vae")
    checked(lab, WAN21, f"model.path={model}")


# ---------------------------------------------------------------- keys of other families


KEYS = [
    *((name, "train.expert=low", ["has one transformer", "remove the key"]) for name in SINGLE),
    *(
        (name, "generate.guidance_scale_2=3.0", ["has one transformer", "remove the key"])
        for name in SINGLE
    ),
    *(
        (name, "train.guidance=6", ["takes no guidance as an input", "remove the key"])
        for name in (WAN21, A14B_I2V, TI2V)
    ),
    (HUNYUAN, "generate.negative_prompt=blurred", ["no negative prompt", "remove the key"]),
    (HUNYUAN, "model.task=i2v", ["does t2v only", "choose another"]),
    (A14B, "train.expert=middle", ["'middle'", "'high' or 'low'"]),
]


@pytest.mark.parametrize(("name", "override", "words"), KEYS)
def test_a_key_that_the_family_does_not_have_is_refused(
    lab: Lab, name: str, override: str, words: list[str]
) -> None:
    for verb in ("preprocess", "train", "export", "generate"):
        message = lab.refusal(name, verb, override)
        says(message, f"{lab.worlds[name].recipe}: ", override.partition("=")[0], *words)
        if "'" not in words[0] and "negative" not in override:
            says(message, override.removesuffix(".0") if "guidance=" in override else override)


@pytest.mark.parametrize("name", [A14B, A14B_I2V])
def test_experts_and_their_guidance_are_for_a14b(lab: Lab, name: str) -> None:
    for expert, folder in (("high", "transformer"), ("low", "transformer_2")):
        override = f"train.expert={expert}"
        guided = ("generate.guidance_scale=4.0", "generate.guidance_scale_2=3.0")
        recipe = lab.worlds[name].load(override, *guided)
        assert recipe.transformers == (folder,)
    message = lab.refusal(name, "generate", "generate.guidance_scale_2=3.0")
    says(message, "generate.guidance_scale_2=3", "guidance_scale=1 switches guidance off")


def test_folders_that_coincide_are_refused(lab: Lab, tmp_path: Path) -> None:
    keys = ("model.path", "source.path", "shards.path", "run_dir")
    for one, other in itertools.combinations(keys, 2):
        message = lab.refusal(WAN21, "train", f"{one}={tmp_path}", f"{other}={tmp_path}/.")
        says(message, f"{other}={tmp_path}", f"is {one} as well", "a folder of its own")


# ---------------------------------------------------------------- prompts and first images


def text_file(folder: Path) -> str:
    (folder / "notes.png").write_text("no picture")
    return "notes.png"


def cut_image(folder: Path) -> str:
    whole = (folder / "first.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return "cut.png"


def cut_video(folder: Path) -> str:
    whole = (folder / "first.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    return "cut.mp4"


def a_folder(folder: Path) -> str:
    (folder / "pictures").mkdir()
    return "pictures"


Given = Mapping[str, str | Callable[[Path], str]]
IMAGES: dict[str, tuple[str, Given, list[str]]] = {
    "no image": (WAN21_I2V, {}, ["has no first image", "add image_path or video_path"]),
    "an empty path": (A14B_I2V, {"image_path": ""}, ["has no first image"]),
    "an image too many": (WAN21, {"image_path": "first.png"}, ["remove image_path and video_path"]),
    "a video too many": (HUNYUAN, {"video_path": "first.mp4"}, ["a text-to-video model", "remove"]),
    "TI2V as text-to-video": (TI2V, {"image_path": "first.png"}, ["remove image_path"]),
    "TI2V as image-to-video": (TI2V_I2V, {}, ["has no first image"]),
    "no such image": (
        *(WAN21_I2V, {"image_path": "gone.png"}),
        ["image_path: ", "gone.png is not there", "relative to the JSON file"],
    ),
    "no such video": (A14B_I2V, {"video_path": "gone.mp4"}, ["video_path: ", "is not there"]),
    "a folder": (WAN21_I2V, {"image_path": a_folder}, ["pictures", "is not there"]),
    "an address": (
        *(TI2V_I2V, {"image_path": "https://example.org/a.png"}),
        ["image_path: https://example.org/a.png is an address", "fetch the file"],
    ),
    "no picture": (WAN21_I2V, {"image_path": text_file}, ["notes.png: gives no image"]),
    "half a picture": (A14B_I2V, {"image_path": cut_image}, ["cut.png", "save it anew"]),
    "half a video": (TI2V_I2V, {"video_path": cut_video}, ["cut.mp4", "give another file"]),
}


@pytest.mark.parametrize("what", IMAGES)
def test_a_prompt_with_the_wrong_first_image_is_refused_before_anything_is_loaded(
    lab: Lab, tmp_path: Path, what: str
) -> None:
    name, given, words = IMAGES[what]
    source = lab.worlds[WAN21_I2V].root
    for file in ("first.png", "first.mp4"):
        shutil.copy(source / file, tmp_path)
    paths = {
        key: value if isinstance(value, str) else value(tmp_path) for key, value in given.items()
    }
    image = {} if name in (WAN21, HUNYUAN, TI2V) else {"image_path": "first.png"}
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"caption": "fine", **image}, {"caption": "not", **paths}]))
    for verb, key in (("preprocess", "validation"), ("generate", "generate"), ("run", "generate")):
        message = lab.refusal(name, verb, f"{key}.prompts={prompts}", "generate.weights=base")
        says(message, f"{prompts}: data[1]", *words)


@pytest.mark.parametrize("key", ["image_path", "video_path"])
def test_a_first_image_may_come_from_an_absolute_path(lab: Lab, tmp_path: Path, key: str) -> None:
    from fastvideo.generate import requests

    file = lab.worlds[WAN21_I2V].root / ("first.png" if key == "image_path" else "first.mp4")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"caption": "fine", key: str(file)}]))
    (request,) = requests(lab.worlds[WAN21_I2V].load(f"generate.prompts={prompts}"))
    assert request["image"]["path"] == str(file)
