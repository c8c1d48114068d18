# SPDX-License-Identifier: Apache-2.0
"""Preprocessing shared out: among tasks of an array, and among processes of one task."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvideo import atomic, state
from fastvideo.arguments import parse_every
from fastvideo.data import fill
from fastvideo.data.gpus import visible_gpus
from fastvideo.errors import Failed, UserError
from fastvideo.launch.folder import PartFolder
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.tiny_world import (
    World,
    digests,
    fastvideo,
    in_fork,
    make_world,
    start_command,
    start_fork,
    wait_for,
)
from tests.words import read_words

TWO = "preprocess.processes=2"
RESULTS = ("shard-*", "validation.parquet", "validation.json")


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    world = make_world(tmp_path, clips=5, model=tiny_model)
    world.recipe.write_text(world.recipe.read_text().replace("rows: 3", "rows: 1"))
    return world


def missing(world: World) -> list[int]:
    store = ShardStore(world.shards)
    plan = store.read_plan()
    assert plan is not None
    return state.missing_shards(store, plan)


def prompts_are_there(world: World) -> bool:
    return state.read_marker(ShardStore(world.shards).validation) is not None


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def replace_shards(world: World) -> None:
    """Plan anew what is already there."""
    for file in world.shards.glob("*"):
        file.unlink()
    preprocess(world.load(), manifest_only=True)


def test_each_task_fills_every_nth_shard_and_the_last_judges(world: World) -> None:
    with pytest.raises(UserError, match="run preprocess --manifest-only first"):
        preprocess(world.load(), every=(0, 2))
    (world.root / "clips/videos/3.mp4").write_bytes(b"no video")
    preprocess(world.load(), manifest_only=True)
    assert preprocess(world.load(), every=(2, 3)) == {
        "filled": [2],
        "missing": [],
        "clips": {"encoded": 1},
    }
    assert prompts_are_there(world), "by the first that found them not encoded"
    done = fastvideo("preprocess", world, "--every", "0/3")
    assert done.code == 0, done.err
    assert missing(world) == [1]
    done = fastvideo("preprocess", world, "--every", "1/3")
    assert done.code == 2 and "1 of 5 clips failed" in done.err and missing(world) == []
    assert fastvideo("preprocess", world, "--shards", "1").code == 2, "nor is it forgotten"
    assert fastvideo("preprocess", world, "--every", "1/3", "source.max_failed=0.2").code == 0


@pytest.mark.parametrize("text", ["3/3", "1", "1/0", "-1/3", "1/3/5", "a/3"])
def test_a_wrong_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--every {text}"):
        parse_every(text)


def test_a_share_does_not_go_with_other_choices(world: World) -> None:
    assert parse_every("7/8") == (7, 8)
    for options, said in (
        (("--shards", "1"), "leave out one of them"),
        (("--manifest-only",), "leave out --every"),
    ):
        done = fastvideo("preprocess", world, "--every", "0/2", *options)
        assert done.code == 2 and said in done.err
    done = fastvideo("train", world, "--every", "0/2")
    assert done.code == 2 and "--every belongs to preprocess" in done.err


def test_prompts_are_encoded_by_one_and_by_another_if_that_dies(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(world.load(), manifest_only=True)
    claimed = world.root / "claimed"

    def claim() -> None:
        with atomic.alone(ShardStore(world.shards).prompts_lock, busy=""):
            claimed.touch()
            time.sleep(60)

    holder = start_fork(claim, environment={})
    until(claimed.exists)
    preprocess(world.load(), every=(0, 2))
    assert not prompts_are_there(world) and missing(world) == [1, 3], "it goes on without"
    monkeypatch.setattr(fill, "PROMPTS_S", 1.0)
    with pytest.raises(Failed, match=r"validation\.lock has not encoded the prompts"):
        preprocess(world.load(), every=(1, 2))
    assert missing(world) == []
    monkeypatch.undo()
    last = start_fork(lambda: preprocess(world.load(), every=(1, 2)), environment={})
    time.sleep(1)
    os.kill(holder, signal.SIGKILL)
    wait_for(holder)
    assert wait_for(last) == 0 and prompts_are_there(world)


def test_two_processes_make_the_same_files_as_one(world: World) -> None:
    assert preprocess(world.load())["filled"] == [0, 1, 2, 3, 4]
    expected = digests(world.shards, *RESULTS)
    for file in world.shards.glob("*"):
        file.unlink()
    done = fastvideo("preprocess", world, TWO, "preprocess.decode_workers=1")
    assert done.code == 0, done.err
    assert "[1/2]" in done.err and "[2/2]" in done.err
    assert digests(world.shards, *RESULTS) == expected
    assert fastvideo("preprocess", world, TWO).code == 0


def test_the_first_fault_of_a_process_ends_all_with_its_message(world: World) -> None:
    preprocess(world.load(), manifest_only=True)
    video = world.root / "clips/videos/1.mp4"
    video.write_bytes(video.read_bytes() + b"more")
    done = fastvideo("preprocess", world, TWO, "--shards", "0-4")
    assert done.code == 2 and "1.mp4: changed since the manifest was planned" in done.err
    assert "Traceback" not in done.err
    assert in_fork(lambda: preprocess(world.load(TWO))) == 0

    replace_shards(world)
    child = start_command("preprocess", world, TWO)
    until(lambda: len(children(child)) == 2)
    os.kill(children(child)[0], signal.SIGKILL)
    assert wait_for(child) == 1
    said = (world.root / "stderr.txt").read_text()
    assert "of those that fill shards was killed by SIGKILL, most likely out of" in said


def children(parent: int) -> list[int]:
    """Processes that were spawned to fill shards."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


@pytest.mark.parametrize("to_all", [False, True])
def test_a_stop_ends_all_processes_and_asks_for_more(
    world: World, monkeypatch: pytest.MonkeyPatch, to_all: bool
) -> None:
    part = PartFolder(world.root / "jobs/1/preprocess")
    preprocess(world.load(), manifest_only=True)
    monkeypatch.setenv("FASTVIDEO_JOB_DIR", str(part.root))
    monkeypatch.setenv("FASTVIDEO_TASK", "3")
    child = start_command("preprocess", world, TWO, "--every", "0/1")
    until(lambda: len(children(child)) == 2)
    until(lambda: len(missing(world)) < 5)
    started = children(child)
    for pid in (*(started if to_all else ()), child):
        os.kill(pid, signal.SIGUSR2)
    assert wait_for(child) == 75, (world.root / "stderr.txt").read_text()
    assert not any(map(atomic.running, started))
    (word,) = read_words(part)
    assert (word.task, word.verb, word.code, word.requeue) == (3, "preprocess", 75, True)
    assert word.progress == 5 - len(missing(world))
    assert part.requeue(3).exists()

    monkeypatch.setenv("FASTVIDEO_RESTART", "1")
    done = fastvideo("preprocess", world, TWO, "--every", "0/1")
    assert done.code == 0, done.err
    assert not part.requeue(3).exists()
    assert len(list(part.ended.iterdir())) == 2, "processes of it leave no word"
    assert read_words(part)[-1].result["missing"] == []


def test_a_stop_by_a_person_does_not_ask_for_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = PartFolder(world.root / "jobs/1/manifest")
    monkeypatch.setenv("FASTVIDEO_JOB_DIR", str(part.root))
    child = start_command("preprocess", world)
    until((world.shards / "manifest.json").exists)
    os.kill(child, signal.SIGINT)
    assert wait_for(child) == 75
    (word,) = read_words(part)
    assert word.code == 75 and not word.requeue and not part.requeue(0).exists()


def test_a_clip_that_cannot_be_read_is_named_with_its_shard(world: World) -> None:
    preprocess(world.load(), manifest_only=True)
    video = world.root / "clips/videos/2.mp4"
    video.unlink()
    video.symlink_to(video)  # a loop, which no clip is to blame for
    for overrides in ((), ("preprocess.decode_workers=1",)):
        done = fastvideo("preprocess", world, "--every", "2/3", *overrides)
        assert done.code == 1
        assert "fastvideo preprocess: shard 2, clip '2.mp4': " in done.err, done.err
        assert "Traceback" not in done.err


def test_gpus_are_those_that_the_environment_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(value: str) -> list[str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        return visible_gpus()

    assert shown("0,3") == ["0", "3"]
    assert shown("GPU-a1, MIG-b2") == ["GPU-a1", "MIG-b2"]
    assert shown("2,-1,3") == ["2"] and shown("") == [] and shown("-1") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listing: dict[str, Any] = {
        "GPU 0: NVIDIA H200 (UUID: GPU-0f3c-11)": 0,
        "  MIG 1g.18gb Device 0: (UUID: MIG-55)": 0,
        "GPU 1: NVIDIA H200 (UUID: GPU-77ab-22)": 0,
    }
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(listing) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_gpus() == ["GPU-0f3c-11", "GPU-77ab-22"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == []
