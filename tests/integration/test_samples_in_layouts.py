# SPDX-License-Identifier: Apache-2.0
"""Videos sampled by several processes are those of one, and a stop reaches all of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastvideo import generate, state
from fastvideo.errors import Stopped
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, ShardStore, TrainDir
from fastvideo.train import inputs, sampler, worker
from fastvideo.train.process import Process
from tests.layouts_job import Layout, losses, same, train_in, weights
from tests.ranks import in_ranks
from tests.tiny_world import Pair, World, in_fork, make_world

ONE = Layout()
FSDP = Layout(shard=2)
LAYOUTS = [Layout(replicate=2), Layout(replicate=2, shard=2), Layout(shard=4, sequence=2)]
OPTIONS = ("train.steps=2", "train.global_batch_size=4", "train.heldout.every_steps=null")
SAMPLED = (*OPTIONS, "train.samples.every_steps=2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """Three prompts, which divide among no groups; one takes more steps, one is smaller."""
    world = make_world(tmp_path_factory.mktemp("job"), clips=4, model=tiny_model)
    own = {"num_inference_steps": 3, "num_frames": 5}
    prompts = ["a red square", {"caption": "a green one", **own}, "a blue one"]
    (world.root / "prompts.json").write_text(json.dumps(prompts))
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture(scope="module")
def one(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sampled in one process."""
    run_dir = tmp_path_factory.mktemp("one")
    sampled_in(world, run_dir, ONE)
    return run_dir


def sampled_in(world: World, run_dir: Path, layout: Layout, *overrides: str) -> None:
    """Train in forked processes that keep the frames of each video beside it."""
    write_made = generate.write_made

    def keep(path: Path, frames_FHWC: Any, about: dict[str, Any]) -> None:
        write_made(path, frames_FHWC, about)
        np.save(path.with_suffix(".npy"), frames_FHWC)

    vars(sampler)["write_made"] = keep
    train_in(world, run_dir, layout, *SAMPLED, *overrides)
    vars(sampler)["write_made"] = write_made


def frames(directory: TrainDir) -> dict[str, npt.NDArray[np.int16]]:
    found = sorted(directory.samples.glob("*/*.npy"))
    return {f"{p.parent.name}/{p.stem}": np.load(p).astype(np.int16) for p in found}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_makes_the_videos_of_one_process(
    world: World, one: Path, tmp_path: Path, layout: Layout
) -> None:
    sampled_in(world, tmp_path, layout)
    found, expected = (frames(RunDir(run_dir).training()) for run_dir in (tmp_path, one))
    assert len(found) == 2 * 3 and found.keys() == expected.keys()
    for name, video in found.items():
        assert video.shape == expected[name].shape
        assert np.abs(video - expected[name]).max() <= 1, "sums in another order"
    for step in (0, 2):
        assert RunDir(tmp_path).training().sampled_marker(step).exists()


def test_sampling_changes_no_bit_of_a_sharded_training(world: World, tmp_path: Path) -> None:
    sampled, plain = tmp_path / "sampled", tmp_path / "plain"
    train_in(world, sampled, FSDP, *SAMPLED)
    train_in(world, plain, FSDP, *OPTIONS)
    assert losses(sampled) == losses(plain)
    assert same(weights(sampled, 2), weights(plain, 2))


def test_the_other_expert_is_loaded_in_shards(tmp_path: Path) -> None:
    """First its base weights, then its checkpoint, saved by another layout."""
    pair = Pair("wan2.2-a14b", "i2v")
    write_tiny(tmp_path / "model", family=pair.family, task=pair.task)
    world = make_world(tmp_path / "job", clips=4, model=tmp_path / "model", pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    last = []
    for layout in (ONE, FSDP):
        run_dir = tmp_path / str(layout)
        for expert in ("high", "low"):
            sampled_in(world, run_dir, layout, f"train.expert={expert}", "train.steps=1")
        last.append(frames(RunDir(run_dir).training("transformer_2")))
    assert last[0].keys() == last[1].keys() and len(last[0]) == 2 * 2
    for name, video in last[0].items():
        assert np.abs(video - last[1][name]).max() <= 1


@dataclass
class Asked:
    """Pulse and stop of one process: it is asked for a stop in the midst of sampling step 1."""

    rank: int
    beats: list[tuple[int, str]] = field(default_factory=list)

    def beat(self, step: int, phase: str) -> None:
        self.beats.append((step, phase))

    def reason(self) -> str | None:
        return "TERM" if self.rank == 1 and self.beats.count((1, "sampling")) == 5 else None

    def honour(self) -> None:
        pass


def test_a_stop_of_one_process_ends_the_sampling_of_all(world: World, tmp_path: Path) -> None:
    often = "train.samples.every_steps=1"
    recipe = world.load(f"run_dir={tmp_path}", *FSDP.overrides(), *SAMPLED, often)
    store = ShardStore(recipe.shards.path)
    plan = state.complete_plan(store)
    about = inputs.facts(recipe, store, plan)["transformer"]

    def work(rank: int) -> list[tuple[int, str]]:
        asked = Asked(rank)
        process = Process(asked, asked, rank, rank, FSDP.processes)
        with pytest.raises(Stopped, match="after step 1 of 2"):
            worker.train(recipe, transformer="transformer", plan=plan, about=about, process=process)
        return asked.beats

    beats = in_ranks(FSDP.processes, work, join=False)
    assert beats[0] == beats[1]
    phases = [phase for step, phase in beats[0] if step == 0]
    # Two of two steps side by side, then one of three, which both make.
    assert phases == ["sampling", "open", *["sampling"] * (1 + 2 + 1 + 3)]
    directory = RunDir(tmp_path).training()
    made = sorted(directory.sampled(1).glob("*.mp4"))
    assert [path.stem for path in made] == ["0000", "0002"], "those of the first round"
    written = [path.stat().st_mtime_ns for path in made]
    assert directory.complete_checkpoints() == [1]
    sampled_in(world, tmp_path, FSDP, often)
    assert [path.stat().st_mtime_ns for path in made] == written, "not sampled again"
    names = [f"step-{step:08d}/{index:04d}.mp4" for step in (0, 1, 2) for index in range(3)]
    assert (
        sorted(str(p.relative_to(directory.samples)) for p in directory.samples.glob("*/*.mp4"))
        == names
    )
