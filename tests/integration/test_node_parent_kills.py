# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of a rank, of all, of torchrun and of the parent: the next start goes on bit for bit.

Each start is the restart after the kill before. ``FASTVIDEO_TEST_KILLS=20`` kills so often at
random moments, and at every fault point of a save instead of two; it takes ten minutes.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvideo.preprocess import preprocess
from tests.parent_job import Command, assert_same, start, until
from tests.tiny_world import World, in_fork, make_world, passes

RANDOM_KILLS = int(os.environ.get("FASTVIDEO_TEST_KILLS", "2"))
TARGETS: dict[str, Callable[[Command], list[int]]] = {
    "a rank": lambda command: command.ranks()[1:],
    "all ranks": lambda command: command.ranks(),
    "torchrun": lambda command: [command.agent()],
    "the parent": lambda command: [command.process.pid],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    world = make_world(tmp_path_factory.mktemp("kills"), clips=5, heldout=1, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[Path, float, list[str]]:
    """Its run directory, the seconds it took, and the fault points of its saves."""
    log, begin_s = world.root / "faults.log", time.monotonic()
    environment = {"FASTVIDEO_FAULT_LOG": str(log)}
    command = start(world, world.root / "undisturbed", environment=environment)
    code, said = command.ended()
    assert code == 0, said
    points = [point for point in passes(log) if point.startswith("checkpoint.")]
    return command.run_dir, time.monotonic() - begin_s, points


@pytest.mark.timeout(400)
def test_whoever_is_killed_in_whatever_step_no_bit_changes(
    world: World, undisturbed: tuple[Path, float, list[str]], tmp_path: Path
) -> None:
    saved = 0
    for target, pids in TARGETS.items():
        command = start(world, tmp_path)
        until(lambda command=command, saved=saved: command.saved() > saved)  # type: ignore[misc]
        saved = command.saved()
        command.signal(signal.SIGKILL, *pids(command))
        assert_dead(command, target)
    command = start(world, tmp_path)
    code, said = command.ended()
    assert code == 0, said
    assert_same(tmp_path, undisturbed[0])
    assert len(list(command.directory.launches.iterdir())) == 5, "older ones are removed"


def assert_dead(command: Command, target: str) -> None:
    """The parent says who died, and nothing is left of it."""
    if target == "the parent":
        command.killed()
        return
    code, said = command.ended()
    words = {"a rank": "rank 1 (process", "all ranks": "rank ", "torchrun": "the process that st"}
    assert code == 1 and f"fastvideo train: {words[target]}" in said, said
    assert "was killed by SIGKILL, most likely out of host memory" in said
    assert "Traceback" not in said


@pytest.mark.timeout(1200)
def test_kills_in_a_save_and_at_random_moments_change_no_bit(
    world: World, undisturbed: tuple[Path, float, list[str]], tmp_path: Path
) -> None:
    expected, seconds, points = undisturbed
    assert {"checkpoint.rename:1", "checkpoint.marker.rename:1"} <= set(points)
    first = [point for point in points if point.endswith(":1")]
    chosen = first if RANDOM_KILLS > 2 else ["checkpoint.rename:1", "checkpoint.marker.rename:1"]
    for point in chosen:
        command = start(world, tmp_path, "--force", environment={"FASTVIDEO_FAULT": point})
        code, said = command.ended()
        assert code == 1 and "was killed by SIGKILL" in said, (point, said)
    moments = random.Random(1)
    for _ in range(RANDOM_KILLS):
        # A person who kills for fun says --force: some starts gain no step.
        command = start(world, tmp_path, "--force")
        time.sleep(moments.uniform(0, seconds))
        kill(command, moments.choice([*TARGETS.values()]))
    code, said = start(world, tmp_path, "--force").ended()
    assert code == 0, said
    assert_same(tmp_path, expected)


def kill(command: Command, pids: Callable[[Command], list[int]]) -> None:
    """Kill what there is of it, the parent where there is nothing else yet."""
    try:
        found = pids(command)
        command.signal(signal.SIGKILL, *found)
    except (ValueError, ProcessLookupError):
        found = []
    if not found and command.process.poll() is None:
        command.signal(signal.SIGKILL)
    command.process.wait(60)
    until(lambda: not command.started(), within_s=10)
