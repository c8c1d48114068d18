# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at every point of a save that goes on beside training, by two processes."""

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastvideo.preprocess import preprocess
from tests.layouts_job import Layout, losses, same, start_training, weights
from tests.ranks import addresses
from tests.tiny_world import World, in_fork, make_world, passes, wait_for

LAYOUT = Layout(shard=2)
OPTIONS = (
    "train.steps=24",
    "train.deterministic=true",
    "train.checkpoint={every_steps: 2, keep_last: 1}",
    "train.heldout.every_steps=null",
    "train.tensorboard=false",
)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("job"), clips=4, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


def run(world: World, run_dir: Path, faults: Mapping[int, Mapping[str, str]]) -> list[int]:
    """Train in two processes with an environment of their own; when one dies, the other is killed.

    Returns:
        How each of them ended.
    """
    together = addresses(LAYOUT.processes)
    children = start_training(
        world,
        run_dir,
        LAYOUT,
        *OPTIONS,
        environments=[{**together, **faults.get(rank, {})} for rank in range(LAYOUT.processes)],
    )
    pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    (other,) = set(children) - {pid}
    if code != 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    codes = {pid: code, other: wait_for(other)}
    return [codes[child] for child in children]


def test_every_point_of_a_save_in_either_process(world: World, tmp_path: Path) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    logged = {rank: {"FASTVIDEO_FAULT_LOG": str(logs[rank])} for rank in range(2)}
    assert run(world, tmp_path / "whole", logged) == [0, 0]
    points = {
        (rank, point)
        for rank, log in enumerate(logs)
        for point in passes(log)
        if point.startswith("checkpoint.") and (point.endswith(":1") or "fsync" in point)
        if point.endswith((":1", ":2"))
    }
    assert {point.partition(":")[0] for _, point in points} >= {
        "checkpoint.write",
        "checkpoint.fsync",
        "checkpoint.rename",
        "checkpoint.marker.write",
        "checkpoint.marker.done",
        "checkpoint.prune",
    }
    # Each start goes on from what the kill before it left.
    for rank, point in sorted(points):
        codes = run(world, tmp_path / "killed", {rank: {"FASTVIDEO_FAULT": point}})
        assert codes[rank] == -9 and codes[1 - rank] != 0, (rank, point)
    assert run(world, tmp_path / "killed", {}) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "killed", 24), weights(tmp_path / "whole", 24))
