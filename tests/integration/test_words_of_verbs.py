# SPDX-License-Identifier: Apache-2.0
"""Verbs that run as processes of a job say how they ended, and whether they are to go on."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvideo.launch.folder import PartFolder
from fastvideo.launch.word import Word
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from tests.tiny_world import World, fastvideo, in_fork, make_world, start_command, wait_for
from tests.words import read_words

LONG = "train.steps=500"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    world = make_world(tmp_path_factory.mktemp("words"), clips=3, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartFolder:
    """Where commands started from here leave word."""
    part = PartFolder(tmp_path / "jobs/1/train")
    monkeypatch.setenv("FASTVIDEO_JOB_DIR", str(part.root))
    return part


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def only_word(part: PartFolder) -> Word:
    (word,) = read_words(part)
    return word


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        *(("train", "SIGTERM"), ("train", "SIGINT"), ("train", "STOP")),
        *(("run", "SIGTERM"), ("run", "STOP")),  # a terminal sends Ctrl-C to all of its group
    ],
)
def test_training_goes_on_by_itself_unless_a_person_stopped_it(
    world: World, part: PartFolder, tmp_path: Path, verb: str, how: str
) -> None:
    training = RunDir(tmp_path).training()
    child = start_command(verb, world, LONG, f"run_dir={tmp_path}")
    until(training.complete_checkpoints)
    if how == "STOP":
        (tmp_path / "STOP").touch()
    else:
        os.kill(child, signal.Signals[how])
    assert wait_for(child) == 75, (world.root / "stderr.txt").read_text()
    word = only_word(part)
    assert (word.verb, word.code, word.requeue) == (verb, 75, how == "SIGTERM")
    assert part.requeue(0).exists() == (how == "SIGTERM")
    done = training.complete_checkpoints()[-1]
    assert word.progress == done + (verb == "run"), "with the one shard that is done"
    assert verb == "run" or f"stopped by {how}" in word.message.replace("the STOP file", "STOP")


def test_mistakes_and_results_are_told(world: World, part: PartFolder, tmp_path: Path) -> None:
    where = f"run_dir={tmp_path / 'run'}"
    assert fastvideo("export", world, where).code == 2
    word = only_word(part)
    assert word.code == 2 and "run train first" in word.message and word.result is None
    options = (where, "generate.weights=base")
    assert fastvideo("generate", world, *options).code == 0
    word = only_word(part)
    assert (word.verb, word.code, word.message) == ("generate", 0, "")
    assert word.result["made"] == 2


def test_a_stop_while_sampling_tells_how_many_videos_are_done(
    world: World, part: PartFolder, tmp_path: Path
) -> None:
    options = (f"run_dir={tmp_path}", "generate.weights=base", "generate.num_inference_steps=300")
    child = start_command("generate", world, *options)
    until((tmp_path / "generate/base/0000.json").exists)
    os.kill(child, signal.SIGUSR2)
    assert wait_for(child) == 75
    word = only_word(part)
    assert (word.code, word.requeue, word.progress) == (75, True, 1)
