# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: when they are written, which stay, and what a full disk or damage does to them."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, TrainDir
from tests.layouts_job import Layout, losses, same, train_in, weights
from tests.tiny_world import World, fastvideo, in_fork, make_world

QUIET = ("train.heldout.every_steps=null", "train.tensorboard=false")


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("job"), clips=4, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


def steps_left(run_dir: Path) -> list[int]:
    return RunDir(run_dir).training().complete_checkpoints()


def test_the_last_ones_and_every_so_many_stay(world: World, tmp_path: Path) -> None:
    done = fastvideo(
        "train",
        world,
        f"run_dir={tmp_path}",
        *QUIET,
        "train.checkpoint={every_steps: 1, keep_last: 2, keep_every: 2}",
    )
    assert done.code == 0, done.err
    assert steps_left(tmp_path) == [2, 4, 5, 6]


def test_minutes_count_as_well_as_steps(world: World, tmp_path: Path) -> None:
    spec = "train.checkpoint={every_steps: 100, every_minutes: 1e-6, keep_last: 9}"
    assert fastvideo("train", world, f"run_dir={tmp_path}", *QUIET, spec).code == 0
    assert steps_left(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("layout", [Layout(), Layout(shard=2)], ids=str)
def test_what_is_written_in_the_background_is_the_state_of_its_step(
    world: World, tmp_path: Path, layout: Layout
) -> None:
    """Training goes on and changes the weights while they are written."""
    for kind in ("true", "false"):
        spec = f"{{every_steps: 1, keep_last: 9, asynchronous: {kind}}}"
        train_in(world, tmp_path / kind, layout, *QUIET, f"train.checkpoint={spec}")
    for step in range(1, 7):
        assert same(weights(tmp_path / "true", step), weights(tmp_path / "false", step)), step


def damage(directory: TrainDir, step: int) -> None:
    """Flip a bit in the middle of the largest file."""
    file = max(directory.checkpoint(step).glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("layout", [Layout(), Layout(replicate=2)], ids=str)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    world: World, tmp_path: Path, layout: Layout, capfd: pytest.CaptureFixture[str]
) -> None:
    often = (*QUIET, "train.checkpoint={every_steps: 1, keep_last: 3}")
    train_in(world, tmp_path / "whole", layout, *often)
    run_dir = tmp_path / "damaged"
    train_in(world, run_dir, layout, *often, "train.steps=4")
    damage(RunDir(run_dir).training(), 4)
    capfd.readouterr()
    train_in(world, run_dir, layout, *often)
    assert "is damaged; going back to the one before" in capfd.readouterr().err
    assert steps_left(run_dir) == [4, 5, 6]
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert same(weights(run_dir, 6), weights(tmp_path / "whole", 6))


def test_if_all_are_damaged_nothing_starts_anew_by_itself(world: World, tmp_path: Path) -> None:
    often = (*QUIET, "train.checkpoint={every_steps: 1, keep_last: 2}")
    assert fastvideo("train", world, f"run_dir={tmp_path}", *often, "train.steps=3").code == 0
    for step in (2, 3):
        damage(RunDir(tmp_path).training(), step)
    for _ in range(2):
        found = fastvideo("train", world, f"run_dir={tmp_path}", *often)
        assert found.code == 2
        assert "every checkpoint is damaged; remove the folder to start anew" in found.err


def test_a_checkpoint_that_was_cut_is_told_too(world: World, tmp_path: Path) -> None:
    often = (*QUIET, "train.checkpoint={every_steps: 1, keep_last: 2}", "train.steps=3")
    assert fastvideo("train", world, f"run_dir={tmp_path}", *often).code == 0
    cut(RunDir(tmp_path).training(), 3)
    found = fastvideo("train", world, f"run_dir={tmp_path}", *often)
    assert found.code == 0
    assert "step-00000003: __0_0.distcp is damaged; going back to the one before" in found.err
    assert steps_left(tmp_path) == [2, 3]
    for step in (2, 3):
        cut(RunDir(tmp_path).training(), step)
    found = fastvideo("train", world, f"run_dir={tmp_path}", *often)
    assert found.code == 2 and "every checkpoint is damaged" in found.err


def cut(directory: TrainDir, step: int) -> None:
    """Lose the second half of a file."""
    (file,) = directory.checkpoint(step).glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("verb", ["export", "generate"])
def test_a_damaged_checkpoint_is_neither_exported_nor_sampled(
    world: World, tmp_path: Path, verb: str
) -> None:
    where = (f"run_dir={tmp_path}", "generate.weights=checkpoint")
    assert fastvideo("train", world, *where, *QUIET, "train.steps=1").code == 0
    damage(RunDir(tmp_path).training(), 1)
    found = fastvideo(verb, world, *where)
    assert found.code == 2
    assert ".distcp: is damaged (its checksum differs)" in found.err


@contextlib.contextmanager
def small_disk(folder: Path, *, mib: float) -> Iterator[Path]:
    """A file system of its own, so that it can be full."""
    folder.mkdir()
    size = f"size={int(mib * 1024)}k"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"component missing: rights to mount a tmpfs ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_ends_the_run_and_leaves_older_checkpoints(
    world: World, tmp_path: Path, asynchronous: str
) -> None:
    """A state of the tiny model takes 7 MiB: two fit, a third does not."""
    spec = f"train.checkpoint={{every_steps: 2, keep_last: 5, asynchronous: {asynchronous}}}"
    with small_disk(tmp_path / "disk", mib=18) as disk:
        run_dir = disk / "run"
        found = fastvideo("train", world, f"run_dir={run_dir}", *QUIET, spec)
        assert found.code == 1, found.err
        assert "Traceback" not in found.err
        assert "step-00000006: cannot be saved (" in found.err
        assert "GiB are free on that disk" in found.err
        assert "complete ones are intact, the newest is of step 4" in found.err
        assert steps_left(run_dir) == [2, 4]
        assert not list(RunDir(run_dir).training().checkpoints.glob(".*")), "nothing left over"
        fewer = "train.checkpoint={every_steps: 2, keep_last: 1}"
        again = fastvideo("train", world, f"run_dir={run_dir}", *QUIET, fewer)
        assert again.code == 0, again.err
        os.sync()
        reference = tmp_path / "reference"
        assert fastvideo("train", world, f"run_dir={reference}", *QUIET, spec).code == 0
        assert losses(run_dir) == losses(reference)
        assert steps_left(run_dir) == [6]
