# SPDX-License-Identifier: Apache-2.0
"""Videos that are sampled while training are those that `generate` makes, and disturb nothing."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fastvideo import generate as sampling
from fastvideo.export import export
from fastvideo.generate import generate
from fastvideo.models import wan_forward
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, TrainDir, read_checkpoint_marker
from fastvideo.train import loop, sampler
from fastvideo.train.launcher import train
from tests.layouts_job import losses, same, weights
from tests.tiny_world import PAIRS, WAN21, Pair, World, digests, fastvideo, in_fork, make_world

NO_HELDOUT = "train.heldout.every_steps=null"
SAMPLED = ("train.samples={every_steps: 2}", "train.steps=4", NO_HELDOUT)
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """Three prompts, one of which takes more steps."""
    world = make_world(tmp_path_factory.mktemp("samples"), clips=4, model=tiny_model)
    prompts = ["a red square", {"caption": "a green one", "num_inference_steps": 3}, "a blue one"]
    (world.root / "prompts.json").write_text(json.dumps(prompts))
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture(scope="module", autouse=True)
def frames_are_kept() -> Iterator[None]:
    """Beside each video: the encoder gives equal pictures not always the same bytes."""
    write_made = sampling.write_made

    def keep(path: Path, frames_FHWC: Any, about: dict[str, Any]) -> None:
        write_made(path, frames_FHWC, about)
        np.save(path.with_suffix(".npy"), frames_FHWC)

    vars(sampler)["write_made"] = keep
    yield
    vars(sampler)["write_made"] = write_made


# ---------------------------------------------------------------- what they are


def guided(pair: Pair) -> tuple[str, ...]:
    """Guidance as the model takes it."""
    if pair.family == "hunyuan-video":
        return ("generate.guidance_scale=6",)
    more = ("generate.guidance_scale_2=3",) if "a14b" in pair.family else ()
    return ("generate.guidance_scale=2", "generate.negative_prompt=something blue", *more)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_samples_are_the_videos_of_the_exported_model_bit_for_bit(
    pair: Pair, tmp_path: Path
) -> None:
    """And no text or image encoder is at hand while it trains."""
    check_samples(pair, tmp_path)


ADAPTERS = (
    "train.method={kind: lora, rank: 3, alpha: 6, norms: true}",
    "train.optimizer.lr=1e-2",
    "train.ema={decay: 0.5}",
)


@pytest.mark.parametrize("pair", [WAN21, Pair("wan2.2-a14b"), Pair("hunyuan-video")], ids=str)
def test_so_are_those_of_averaged_adapters(pair: Pair, tmp_path: Path) -> None:
    """Of A14B the other expert has its average as well."""
    check_samples(pair, tmp_path, *ADAPTERS)


def check_samples(pair: Pair, tmp_path: Path, *options: str) -> None:
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    world = make_world(tmp_path, clips=2, model=tmp_path / "model", pair=pair)
    samples = ("train.samples={every_steps: 2}", "train.steps=2", NO_HELDOUT)
    recipe = world.load("shards.dtype=float32", *samples, *guided(pair), *options)
    base = world.load("generate.weights=base", *guided(pair))

    def work() -> None:
        if "ti2v" in pair.family:
            embed_by_token()
        preprocess(recipe)
        put_aside(tmp_path / "model", tmp_path)
        recorded(tmp_path / "trained.npy", lambda: train(recipe))
        put_aside(tmp_path, tmp_path / "model")
        export(recipe)
        recorded(tmp_path / "base.npy", lambda: generate(base))
        recorded(tmp_path / "export.npy", lambda: generate(recipe))

    assert in_fork(work) == 0
    first, last = np.load(tmp_path / "base.npy"), np.load(tmp_path / "export.npy")
    during = np.load(tmp_path / "trained.npy")
    assert np.array_equal(during[:2], first) and np.array_equal(during[-2:], last)
    assert not np.allclose(first, last, atol=1e-4), "training did something"


def put_aside(folder: Path, other: Path) -> None:
    for name in ENCODERS:
        if (folder / name).exists():
            for file in (folder / name).glob("*.safetensors"):
                (other / name).mkdir(exist_ok=True)
                file.rename(other / name / file.name)


def recorded(into: Path, action: Callable[[], object]) -> None:
    """Run ``action`` and keep the numbers of each video before they become 8-bit colours."""
    videos: list[Any] = []
    to_frames = sampling.to_frames

    def record(video_FHWC: Any) -> Any:
        videos.append(video_FHWC)
        return to_frames(video_FHWC)

    for module in (sampling, sampler):
        vars(module)["to_frames"] = record
    action()
    for module in (sampling, sampler):
        vars(module)["to_frames"] = to_frames
    np.save(into, np.stack(videos))


def embed_by_token() -> None:
    """Embed the timestep of each token of TI2V-5B, in this forked process only.

    Our forward embeds one for each frame; a product of fewer rows differs in the last digit, which
    is all that keeps these samples from being equal without this.
    """

    def share(timestep: Tensor, *, grid: tuple[int, int, int], **_: Any) -> Any:
        count = grid[0] * grid[1] * grid[2]
        return timestep, wan_forward.Part(slice(0, count), [count])

    wan_forward._share = share


def test_the_other_expert_is_its_newest_checkpoint_or_the_base_model(tmp_path: Path) -> None:
    pair = Pair("wan2.2-a14b")
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    world = make_world(tmp_path, clips=2, model=tmp_path / "model", pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    for expert, said in (("high", "transformer_2 of the base model"), ("low", "step-00000002")):
        done = fastvideo("train", world, *SAMPLED, "train.steps=2", f"train.expert={expert}")
        assert done.code == 0, done.err
        assert f"sampling with transformer{'_2' if expert == 'high' else ''} of" in done.err
        assert said in done.err
    marker = read_checkpoint_marker(RunDir(world.run_dir).training().checkpoint(2))
    assert marker is not None
    made = [about(RunDir(world.run_dir).training(n), 2) for n in ("transformer", "transformer_2")]
    assert [one["model"]["transformers"] for one in made] == [
        {"transformer": {"step": 2}, "transformer_2": "base"},
        {"transformer": {"step": 2, "id": marker["id"]}, "transformer_2": {"step": 2}},
    ]


def about(directory: TrainDir, step: int) -> dict[str, Any]:
    """What a video says of itself."""
    found: dict[str, Any] = json.loads((directory.sampled(step) / "0000.json").read_text())
    return found


# ---------------------------------------------------------------- what they leave alone


def test_sampling_changes_no_bit_of_the_training_and_leaves_no_vae_behind(
    world: World, tmp_path: Path
) -> None:
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    assert in_fork(lambda: train(world.load(f"run_dir={plain}", *SAMPLED[1:]))) == 0

    def work() -> None:
        one_step = loop.Loop.one_step

        def looked_at(self: loop.Loop, step: int) -> None:
            assert not [o for o in gc.get_objects() if isinstance(o, AutoencoderKLWan)]
            torch.rand(1)  # moves the random numbers that sampling must give back
            before = torch.random.get_rng_state()
            one_step(self, step)
            assert torch.equal(torch.random.get_rng_state(), before)

        def given_back(self: loop.Loop, step: int) -> bool:
            before = torch.random.get_rng_state()
            found = sample(self, step)
            assert torch.equal(torch.random.get_rng_state(), before)
            assert self._job.saved.model.training
            return found

        sample = loop.Loop._sample
        loop.Loop.one_step, loop.Loop._sample = looked_at, given_back  # type: ignore[method-assign]
        train(world.load(f"run_dir={sampled}", *SAMPLED))

    assert in_fork(work) == 0
    assert losses(sampled) == losses(plain)
    assert same(weights(sampled, 4), weights(plain, 4))
    folders = RunDir(sampled).training().sample_folders()
    assert list(folders) == [0, 2, 4]
    for folder in folders.values():
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"{i:04d}.{end}" for i in range(3) for end in ("json", "mp4", "npy")] + [
            "complete.json"
        ]


def test_only_the_first_prompts_are_sampled(world: World, tmp_path: Path) -> None:
    recipe = world.load(f"run_dir={tmp_path}", *SAMPLED[1:], "train.samples.max_prompts=1")
    assert in_fork(lambda: train(recipe)) == 0
    folders = RunDir(tmp_path).training().sample_folders()
    assert list(folders) == [0, 4], "every 500, and before and after"
    assert [len(list(folder.glob("*.mp4"))) for folder in folders.values()] == [1, 1]


# ---------------------------------------------------------------- stops, kills and resumes


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert in_fork(lambda: train(world.load(f"run_dir={run_dir}", *SAMPLED))) == 0
    return run_dir


@pytest.mark.parametrize(("at", "saves"), [(0, 2), (2, 3), (4, 2)])
def test_a_stop_while_sampling_loses_nothing_and_repeats_nothing(
    world: World,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    saves: int,
) -> None:
    options = (f"run_dir={tmp_path}", f"train.checkpoint.every_steps={saves}", *SAMPLED)
    directory = RunDir(tmp_path).training()
    looks: list[int] = []
    look = sampler.Sampler._look

    def ask(self: sampler.Sampler, step: int) -> None:
        looks.append(step)
        if looks.count(at) == 6:  # in the second video
            RunDir(tmp_path).stop.touch()
        look(self, step)

    monkeypatch.setattr(sampler.Sampler, "_look", ask)
    stopped = fastvideo("train", world, *options)
    monkeypatch.undo()
    assert stopped.code == 75, stopped.err
    made = list(directory.sampled(at).glob("*.mp4"))
    assert [path.name for path in made] == ["0000.mp4"]
    written = made[0].stat().st_mtime_ns
    again = fastvideo("train", world, *options)
    assert again.code == 0, again.err
    assert made[0].stat().st_mtime_ns == written, "not sampled again"
    assert losses(tmp_path) == losses(undisturbed)
    assert_same_videos(directory, RunDir(undisturbed).training())
    before = digests(directory.samples, "*/*")
    finished = fastvideo("train", world, *options)
    assert finished.code == 0 and "already trained" in finished.err
    assert digests(directory.samples, "*/*") == before


def assert_same_videos(one: TrainDir, other: TrainDir, *, steps: Sequence[int] = (0, 2, 4)) -> None:
    assert list(one.sample_folders()) == list(steps)
    for step in steps:
        folders = [directory.sampled(step) for directory in (one, other)]
        for kind in ("*.npy", "*.json"):
            found, expected = (digests(folder, kind) for folder in folders)
            assert found == expected and len(found) >= 3


def test_what_a_killed_run_sampled_after_its_checkpoint_is_made_anew(
    world: World, undisturbed: Path, tmp_path: Path
) -> None:
    recipe = world.load(f"run_dir={tmp_path}", *SAMPLED, "train.checkpoint.every_steps=3")
    assert in_fork(lambda: train(recipe), fault="samples.marker.done:2") == -9
    folder = RunDir(tmp_path).training().sampled(2)
    stale = (folder / "0000.mp4").stat().st_mtime_ns
    assert in_fork(lambda: train(recipe)) == 0
    assert (folder / "0000.mp4").stat().st_mtime_ns != stale
    assert_same_videos(RunDir(tmp_path).training(), RunDir(undisturbed).training())


def test_a_finished_run_that_is_asked_for_samples_makes_those_of_its_last_step(
    world: World, undisturbed: Path, tmp_path: Path
) -> None:
    where = f"run_dir={tmp_path}"
    assert in_fork(lambda: train(world.load(where, *SAMPLED[1:]))) == 0
    assert in_fork(lambda: train(world.load(where, *SAMPLED))) == 0
    one, other = (RunDir(folder).training() for folder in (tmp_path, undisturbed))
    assert_same_videos(one, other, steps=[4])


# ---------------------------------------------------------------- what they are made of


def test_prompts_that_were_not_encoded_are_refused_before_training(
    world: World, tmp_path: Path
) -> None:
    guidance = ("generate.guidance_scale=2", "generate.negative_prompt=grey")
    for change in (guidance, (f"validation.prompts={tmp_path / 'other.json'}",)):
        (tmp_path / "other.json").write_text('["something else"]')
        done = fastvideo("train", world, f"run_dir={tmp_path}", *SAMPLED, *change)
        assert done.code == 2 and "train.samples needs" in done.err and "run preprocess" in done.err
    assert not RunDir(tmp_path).training().metrics.exists()


def test_a_model_without_a_vae_is_refused_before_training(
    world: World, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/vae")
    where = (f"run_dir={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}")
    done = fastvideo("train", world, *where, *SAMPLED)
    assert done.code == 2 and "has no vae/" in done.err
    assert not RunDir(tmp_path / "run").training().metrics.exists()


def test_a_disk_that_takes_no_video_ends_the_run_with_its_name(
    world: World, tmp_path: Path
) -> None:
    directory = RunDir(tmp_path).training()
    directory.root.mkdir(parents=True)
    directory.samples.write_text("in the way")
    done = fastvideo("train", world, f"run_dir={tmp_path}", *SAMPLED)
    assert done.code == 1 and "Traceback" not in done.err
    assert "0000.mp4: cannot be written" in done.err


def test_the_negative_prompt_is_encoded_where_guidance_takes_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    world = make_world(tmp_path, clips=1, model=tiny_model)
    store = world.shards / "validation.json"
    encoded = []
    for change in (
        ("generate.negative_prompt=grey",),
        ("generate.negative_prompt=grey", "generate.guidance_scale=2"),
        ("generate.negative_prompt=blue", "generate.guidance_scale=2"),
        ("generate.guidance_scale=2",),
    ):
        assert in_fork(lambda change=change: preprocess(world.load(*change))) == 0  # type: ignore
        encoded.append([row["caption"] for row in json.loads(store.read_text())["rows"]][3:])
    assert encoded == [[], ["grey"], ["blue"], []]
