# SPDX-License-Identifier: Apache-2.0
"""Every model of the suite: its tiny recipe from raw clips to videos of the exported model."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from safetensors import safe_open

from fastvideo import sampled
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.export import export
from fastvideo.export_adapters import write_adapters
from fastvideo.generate import generate
from fastvideo.models.family import find_family
from fastvideo.models.lora_file import read_lora
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.tiny_world import in_fork, write_clip, write_prompts

RECIPES = Path(__file__).parents[2] / "configs/recipes"
TWINS = sorted(path.stem for path in RECIPES.glob("tiny_*_full.yaml"))
LORAS = sorted(path.stem for path in RECIPES.glob("tiny_*_lora.yaml"))

FRESH = """
import json, sys, traceback
from pathlib import Path
import diffusers, numpy, torch
from PIL import Image
for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        kind = getattr(diffusers, job["pipeline"])
        pipe = kind.from_pretrained(job["folder"])
        for lora in job["loras"]:
            pipe.load_lora_weights(job["export"], **lora)
        pipe.set_progress_bar_config(disable=True)
        image = {"image": Image.open(job["image"])} if job["image"] else {}
        video = pipe(
            **job["call"], **image, generator=torch.Generator().manual_seed(5), output_type="np"
        )
        numpy.save(job["out"], video.frames[0])
    except Exception:
        Path(job["out"] + ".txt").write_text(traceback.format_exc())
assert not any(name.split(".")[0] == "fastvideo" for name in sys.modules)
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A tiny recipe that ran from clips to videos."""

    recipe: Recipe
    image: Path
    """An image of the recipe's size, for image-to-video."""
    fresh: Path
    """Where the fresh process puts its video."""

    def load(self, *overrides: str) -> Recipe:
        """The recipe with further overrides."""
        return Recipe.load(RunDir(self.recipe.run_dir).root / "job.yaml", overrides)

    @property
    def export(self) -> Path:
        """What diffusers loads."""
        return RunDir(self.recipe.run_dir).export

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline."""
        clip = self.recipe.clip
        return {
            "prompt": "a red square moves right",
            "num_frames": clip.num_frames,
            "height": clip.height,
            "width": clip.width,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
        }


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All tiny recipes, run, and their exports sampled in one fresh process without fastvideo."""
    root = tmp_path_factory.mktemp("every")
    (root / "clips/videos").mkdir(parents=True)
    captions = [write_clip(root / f"clips/videos/{i}.mp4", index=i) for i in range(4)]
    items = [{"path": f"{i}.mp4", "cap": [caption]} for i, caption in enumerate(captions)]
    items[3]["split"] = "heldout"
    (root / "clips/videos2caption.json").write_text(json.dumps(items))
    jobs = {name: run(root, name) for name in (*TWINS, *LORAS)}
    sample_afresh(root, jobs)
    return jobs


def run(root: Path, name: str) -> Job:
    folder = root / name
    folder.mkdir()
    written = Recipe.load(RECIPES / f"{name}.yaml")
    write_prompts(folder, task=written.model.task)
    overrides = {
        "model.path": root / Path(written.model.path).name,
        "source.path": root / "clips",
        "shards.path": root / "shards" / Path(written.shards.path).name,
        "run_dir": folder / "run",
        "validation.prompts": folder / "prompts.json",
        "generate.prompts": folder / "prompts.json",
        "generate.num_inference_steps": 2,
        "preprocess.decode_workers": 0,
        "train.steps": 4,
        "train.checkpoint.every_steps": 2,
        "train.heldout.every_steps": 4,
        "train.loader_workers": 0,
    }
    if name in LORAS:
        adapters = {"rank": 3, "alpha": 12, "biases": "true", "dropout": 0.1}
        overrides |= {f"train.method.{key}": value for key, value in adapters.items()}
        overrides |= {"train.optimizer.lr": 1e-2, "export.comfyui": "true"}
    pairs = [f"{key}={value}" for key, value in overrides.items()]
    recipe = Recipe.load(RECIPES / f"{name}.yaml", pairs)
    model = Path(recipe.model.path)
    if not model.exists():
        write_tiny(model, family=recipe.model.family, task=recipe.model.task)
    (folder / "run").mkdir()
    (folder / "run/job.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))

    def all_verbs() -> None:
        for verb in (preprocess, train, export, generate):
            verb(recipe)

    assert in_fork(all_verbs) == 0, name
    image = folder / "image.png"
    write_image(image, recipe)
    return Job(recipe, image, folder / "fresh.npy")


def write_image(path: Path, recipe: Recipe) -> None:
    from PIL import Image

    size = (recipe.clip.height, recipe.clip.width, 3)
    pixels = np.random.default_rng(1).integers(0, 255, size, np.uint8)
    Image.fromarray(pixels).save(path)


def sample_afresh(root: Path, jobs: dict[str, Job]) -> None:
    given = {
        name: {
            "pipeline": find_family(job.recipe).pipeline,
            "folder": job.recipe.model.path if name in LORAS else str(job.export),
            "export": str(job.export),
            "loras": loras(job.recipe) if name in LORAS else [],
            "call": job.call,
            "image": str(job.image) if job.recipe.model.task == "i2v" else None,
            "out": str(job.fresh),
        }
        for name, job in jobs.items()
    }
    (root / "jobs.json").write_text(json.dumps(given))
    command = [sys.executable, "-c", FRESH, str(root / "jobs.json")]
    subprocess.run(command, check=True, cwd=root)


def loras(recipe: Recipe) -> list[dict[str, Any]]:
    """Arguments of ``load_lora_weights``, as the model card has them."""
    first: dict[str, Any] = {"weight_name": "pytorch_lora_weights.safetensors"}
    second = {
        "weight_name": "pytorch_lora_weights_2.safetensors",
        "load_into_transformer_2": True,
    }
    return [first, second][: len(recipe.architecture.transformers)]


def sample_here(job: Job, *overrides: str, weights: str) -> npt.NDArray[np.float32]:
    """The same video from what is in memory: a checkpoint in the base model, or the base."""
    from PIL import Image

    recipe = job.load(f"generate.weights={weights}", *overrides)
    pipeline: Any = sampled.load(recipe, sampled.find(recipe))
    image = {"image": Image.open(job.image)} if recipe.model.task == "i2v" else {}
    made = pipeline(
        **job.call, **image, generator=torch.Generator().manual_seed(5), output_type="np"
    )
    video: npt.NDArray[np.float32] = made.frames[0]
    return video


def test_every_pair_of_model_and_task_has_a_tiny_recipe() -> None:
    models = {(r.model.family, r.model.task) for r in map(load, TWINS)}
    families = ("wan2.1", "wan2.2-a14b", "wan2.2-ti2v-5b")
    wanted = {(family, task) for family in families for task in ("t2v", "i2v")}
    assert models == {*wanted, ("hunyuan-video", "t2v")}
    assert len(TWINS) == len(LORAS) == 7
    assert {(r.model.family, r.model.task) for r in map(load, LORAS)} == models


def load(name: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", [*TWINS, *LORAS])
def test_the_export_in_a_fresh_process_is_what_was_trained(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    errors = Path(f"{job.fresh}.txt")
    assert not errors.exists(), errors.read_text()
    fresh, trained = np.load(job.fresh), sample_here(job, weights="checkpoint")
    clip = job.recipe.clip
    assert fresh.shape == (clip.num_frames, clip.height, clip.width, 3)
    assert np.array_equal(fresh, trained), "bit for bit"
    assert not np.array_equal(fresh, sample_here(job, weights="base")), "training did something"


@pytest.mark.parametrize("name", [*TWINS, *LORAS])
def test_videos_have_the_recipes_size_and_say_how_they_were_made(
    jobs: dict[str, Job], name: str
) -> None:
    recipe = jobs[name].recipe
    videos = sorted(RunDir(recipe.run_dir).generated("export").glob("*.mp4"))
    assert len(videos) == 2
    for index, video in enumerate(videos):
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (recipe.clip.width, recipe.clip.height)
            assert len(list(container.decode(stream))) == recipe.clip.num_frames
        about = json.loads(video.with_suffix(".json").read_text())
        assert about["seed"] == recipe.generate.seed + index
        assert ("image" in about) == (recipe.model.task == "i2v")


@pytest.mark.parametrize("name", TWINS)
def test_every_transformer_was_trained_and_exported(jobs: dict[str, Job], name: str) -> None:
    recipe = jobs[name].recipe
    base, exported = Path(recipe.model.path), RunDir(recipe.run_dir).export
    for folder in recipe.architecture.transformers:
        before, after = (weights(root / folder) for root in (base, exported))
        assert before.keys() == after.keys()
        changed = [n for n in before if not torch.equal(before[n], after[n])]
        assert len(changed) > 0.9 * len(before), folder
        configs = [(root / folder / "config.json").read_text() for root in (base, exported)]
        assert json.loads(configs[0]) == json.loads(configs[1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", TWINS)
def test_a_bfloat16_export_loads_as_the_float32_export_does_in_bfloat16(
    jobs: dict[str, Job], name: str, tmp_path: Path
) -> None:
    job = jobs[name]
    from fastvideo import state

    half = job.load("export.dtype=bfloat16")
    family, folder = find_family(half), RunDir(half.run_dir).export
    for transformer in half.architecture.transformers:
        path = state.newest_checkpoints(RunDir(half.run_dir), [transformer])[transformer]
        target = tmp_path / transformer
        from fastvideo.export import _write_transformer

        _write_transformer(half, target, base=Path(half.model.path), checkpoint=path)
        expected: Any = family.load_transformer(folder, folder=transformer, dtype="bfloat16")
        found: Any = family.load_transformer(tmp_path, folder=transformer, dtype="bfloat16")
        stored = weights(target)
        assert torch.bfloat16 in {tensor.dtype for tensor in stored.values()}
        for key, tensor in expected.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[key]), key
            assert stored[key].dtype == tensor.dtype, key


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny_wan2.1_t2v_full", "generate.flow_shift=9"),
        ("tiny_hunyuan_t2v_full", "generate.flow_shift=1.5"),
        ("tiny_hunyuan_t2v_full", "generate.guidance_scale=9"),
        ("tiny_wan2.2_t2v_a14b_full", "generate.guidance_scale_2=4"),
        ("tiny_wan2.2_i2v_a14b_full", "generate.seed=3"),
        ("tiny_wan2.1_i2v_full", "generate.negative_prompt=blue"),
    ],
)
def test_each_setting_of_sampling_has_its_effect(
    jobs: dict[str, Job], name: str, change: str, tmp_path: Path
) -> None:
    videos = []
    for number, overrides in enumerate(((), (change,))):
        run_dir = f"run_dir={tmp_path / str(number)}"
        guided = "generate.guidance_scale=3"
        recipe = jobs[name].load(run_dir, "generate.weights=base", guided, *overrides)
        made = generate(recipe)["videos"]
        videos.append(Path(made[0]).read_bytes())
    assert videos[0] != videos[1]


@pytest.mark.parametrize("name", TWINS)
def test_tiling_of_small_videos_changes_nothing(jobs: dict[str, Job], name: str) -> None:
    """They are one tile; that larger ones come out too is diffusers' own.

    A tile is a view, whose products some processors round otherwise.
    """
    whole, tiled = (
        sample_here(jobs[name], f"generate.vae_tiling={tiling}", weights="base")
        for tiling in ("false", "true")
    )
    assert np.abs(whole - tiled).max() < 1e-5


def test_offloading_is_refused_on_the_cpu(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["tiny_wan2.1_t2v_full"]
    recipe = job.load(f"run_dir={tmp_path}", "generate.weights=base", "generate.offload=model")
    with pytest.raises(UserError, match="offload=model: is for a GPU"):
        generate(recipe)


@pytest.mark.parametrize("name", TWINS)
def test_the_model_card_says_what_it_is(jobs: dict[str, Job], name: str) -> None:
    recipe = jobs[name].recipe
    card = (RunDir(recipe.run_dir).export / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    about = yaml.safe_load(head)
    task = {"t2v": "text-to-video", "i2v": "image-to-video"}[recipe.model.task]
    assert about["library_name"] == "diffusers" and about["pipeline_tag"] == task
    for transformer in recipe.architecture.transformers:
        assert f"| `{transformer}` | 4 | 16 | 3 | 1 |" in text
    assert f"{find_family(recipe).pipeline}.from_pretrained" in text
    assert Recipe.parse(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]), origin="card")


@pytest.mark.parametrize("name", LORAS)
def test_loras_keep_their_alpha_and_say_how_to_load_them(jobs: dict[str, Job], name: str) -> None:
    job = jobs[name]
    card = (job.export / "README.md").read_text()
    base = f"path/to/{Path(job.recipe.model.path).name}"  # where it lies here is nobody's
    assert f"from_pretrained({base!r}" in card and "lora" in card.split("---")[1]
    for given in loras(job.recipe):
        file = given["weight_name"]
        assert f"weight_name={file!r}" in card
        adapter = read_lora(job.export / file)
        assert (adapter.rank, adapter.alpha) == (3, 12)
        ours = read_lora(job.export / file.replace("pytorch_lora_weights", "comfyui"))
        assert ours.pairs().keys() == adapter.pairs().keys()
    assert ("load_into_transformer_2=True" in card) == (len(loras(job.recipe)) == 2)
    assert not (job.export / "model_index.json").exists()


def test_a_bfloat16_lora_is_the_float32_one_rounded(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["tiny_wan2.1_t2v_lora"]
    half = job.load("export.dtype=bfloat16", "export.comfyui=false")
    checkpoint = RunDir(half.run_dir).training().newest_checkpoint()
    assert checkpoint is not None
    write_adapters(
        tmp_path,
        half,
        base=Path(half.model.path),
        transformer="transformer",
        checkpoint=checkpoint,
    )
    found, whole = (read_lora(next(f.glob("pytorch_*"))).tensors for f in (tmp_path, job.export))
    for key, tensor in whole.items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor.bfloat16()), key


@pytest.mark.parametrize("name", [*TWINS, *LORAS])
def test_a_second_run_does_nothing(jobs: dict[str, Job], name: str) -> None:
    recipe = jobs[name].recipe
    assert preprocess(recipe)["filled"] == []
    assert not any(trained["ran"] for trained in train(recipe)["trained"].values())
    assert export(recipe)["ran"] is False
    assert generate(recipe)["made"] == 0


def test_a_run_of_another_model_is_neither_exported_nor_sampled(jobs: dict[str, Job]) -> None:
    """Wan2.1's weights would fit the high-noise expert."""
    where = f"run_dir={jobs['tiny_wan2.1_t2v_full'].recipe.run_dir}"
    recipe = jobs["tiny_wan2.2_t2v_a14b_full"].load(where, "generate.weights=checkpoint")
    for verb in (export, generate):
        with pytest.raises(UserError, match=r"model\.family is another"):
            verb(recipe)


def test_both_tasks_of_ti2v_share_their_shards(jobs: dict[str, Job]) -> None:
    """Training takes the first frame from the video's own latent."""
    one, other = (jobs[f"tiny_wan2.2_ti2v_5b_{task}_full"].recipe for task in ("t2v", "i2v"))
    assert one.shards.path == other.shards.path
    for recipe in (one, other):
        assert preprocess(recipe, shards=[0])["filled"] == []
