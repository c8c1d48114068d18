# SPDX-License-Identifier: Apache-2.0
"""Several processes under ``fastvideo train``: stops, kills, mistakes, hangs, and two nodes.

``FASTVIDEO_TEST_KILLS=20`` kills so often at random moments, and at every fault point of a save
instead of two; it takes ten minutes.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastvideo.launch.folder import PartFolder
from fastvideo.launch.word import newest_words
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.parent_job import Command, assert_same, start, until
from tests.tiny_world import World, in_fork, make_world, passes
from tests.words import read_words

RANDOM_KILLS = int(os.environ.get("FASTVIDEO_TEST_KILLS", "1"))
TARGETS: dict[str, Callable[[Command], list[int]]] = {
    "a rank": lambda command: command.ranks()[1:],
    "all ranks": lambda command: command.ranks(),
    "torchrun": lambda command: [command.agent()],
    "the parent": lambda command: [command.process.pid],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    world = make_world(tmp_path_factory.mktemp("parent"), clips=5, heldout=1, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@dataclass(frozen=True)
class Undisturbed:
    """A run of two processes that nothing disturbed."""

    run_dir: Path
    seconds: float
    fault_points: list[str]
    """Those of its saves."""


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Undisturbed:
    log, begin_s = world.root / "faults.log", time.monotonic()
    environment = {"FASTVIDEO_FAULT_LOG": str(log)}
    command = start(world, world.root / "undisturbed", environment=environment)
    code, said = command.ended()
    assert code == 0, said
    assert list(command.directory.launches.glob("*/rank-[01].json"))
    points = [point for point in passes(log) if point.startswith("checkpoint.")]
    return Undisturbed(command.run_dir, time.monotonic() - begin_s, points)


@pytest.mark.timeout(400)
def test_every_way_to_stop_ends_with_75_and_the_next_start_goes_on(
    world: World, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    importing = start(world, tmp_path)
    until(lambda: len(importing.ranks()) == 2)
    everything = (importing.process.pid, importing.agent(), *importing.ranks())
    importing.signal(signal.SIGTERM, *everything)
    assert_stopped(importing, "SIGTERM", after=0)

    parent_only = start(world, tmp_path)
    until(parent_only.saved)
    # One that starts beside it is told at once, and does no harm.
    beside = start(world, tmp_path)
    assert "another process trains here" in ended_beside(beside)
    parent_only.signal(signal.SIGTERM)
    step = assert_stopped(parent_only, "SIGTERM", after=1)

    as_slurm_does = start(world, tmp_path)
    until(lambda: as_slurm_does.saved() > step)
    everything = (as_slurm_does.process.pid, as_slurm_does.agent(), *as_slurm_does.ranks())
    as_slurm_does.signal(signal.SIGUSR2, *everything)
    step = assert_stopped(as_slurm_does, "SIGUSR2", after=step + 1)

    part = PartFolder(tmp_path / "jobs/1/train")
    by_file = start(world, tmp_path, environment={"FASTVIDEO_JOB_DIR": str(part.root)})
    until(lambda: by_file.saved() > step)
    (tmp_path / "STOP").touch()
    assert_stopped(by_file, "the STOP file", after=step + 1)
    assert not (tmp_path / "STOP").exists()
    (word,) = read_words(part)
    assert word.code == 75 and not word.requeue, "a person does not want it to go on by itself"

    code, said = start(world, tmp_path).ended()
    assert code == 0, said
    assert_same(tmp_path, undisturbed.run_dir)
    again = start(world, tmp_path)
    begin_s = time.monotonic()
    code, said = again.ended()
    assert code == 0 and "already trained" in said and time.monotonic() - begin_s < 10


def assert_stopped(command: Command, reason: str, *, after: int) -> int:
    """It ended as it was asked to, with its state saved; the step it stopped after."""
    code, said = command.ended()
    assert code == 75, said
    step = command.saved()
    assert f"stopped by {reason} after step {step} of" in said
    assert step >= after
    return step


def ended_beside(command: Command) -> str:
    """What a command says that another one keeps from training in the same run."""
    assert command.process.wait(60) == 2
    return command.said.read_text()


@pytest.mark.timeout(2000 if RANDOM_KILLS > 2 else 400)
def test_whoever_is_killed_at_whatever_moment_no_bit_changes(
    world: World, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Each start is the restart after the kill before."""
    saved = 0
    for target, pids in TARGETS.items():
        command = start(world, tmp_path)
        until(lambda command=command, saved=saved: command.saved() > saved)  # type: ignore[misc]
        saved = command.saved()
        command.signal(signal.SIGKILL, *pids(command))
        assert_dead(command, target)
    kill_in_saves(world, undisturbed, tmp_path)
    assert len(list(command.directory.launches.iterdir())) == 5, "older ones are removed"
    kill_at_random(world, undisturbed, tmp_path)
    command = start(world, tmp_path, "--force")
    code, said = command.ended()
    assert code == 0, said
    assert_same(tmp_path, undisturbed.run_dir)


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


def kill_in_saves(world: World, undisturbed: Undisturbed, run_dir: Path) -> None:
    """Whoever passes a fault point of a save for the first time dies there."""
    some = ["checkpoint.rename:1", "checkpoint.marker.rename:1"]
    assert set(some) <= set(undisturbed.fault_points)
    first = [point for point in undisturbed.fault_points if point.endswith(":1")]
    for point in first if RANDOM_KILLS > 2 else some:
        command = start(world, run_dir, "--force", environment={"FASTVIDEO_FAULT": point})
        code = command.process.wait(120)
        said = command.said.read_text()
        if code == -signal.SIGKILL:
            assert point == "checkpoint.prune:1", "the parent removes old checkpoints too"
        else:
            assert code == 1 and "was killed by SIGKILL" in said, (point, said)


def kill_at_random(world: World, undisturbed: Undisturbed, run_dir: Path) -> None:
    """Kill whoever is there after some time; begin anew whenever a start finished before that."""
    moments, killed = random.Random(1), 0
    while killed < RANDOM_KILLS:
        # Whoever kills for fun says --force: some of these starts gain no step.
        command = start(world, run_dir, "--force")
        try:
            code = command.process.wait(moments.uniform(0, 0.8 * undisturbed.seconds))
            assert code == 0, command.said.read_text()
            assert_same(run_dir, undisturbed.run_dir)
            shutil.rmtree(run_dir)
        except subprocess.TimeoutExpired:
            kill(command, moments.choice([*TARGETS.values()]))
            killed += 1


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


@pytest.mark.timeout(200)
def test_a_process_that_hangs_is_named(world: World, tmp_path: Path) -> None:
    # No save is under way when it is stopped: that has more time.
    rare = "train.checkpoint.every_steps=50"
    command = start(world, tmp_path, "train.watch.hang_minutes=0.1", "train.steps=100000", rare)
    until(command.saved)
    ranks = command.ranks()
    command.signal(signal.SIGSTOP, ranks[1])
    code, said = command.ended()
    assert code == 1
    assert f"rank 1 (process {ranks[1]} on " in said and "for 0.1 min; rank 0 waits in" in said
    assert "Traceback" not in said
    (log,) = command.directory.launches.glob("*/rank-0.log")
    assert "most recent call first" in log.read_text(), "where the others wait"
    assert command.saved() > 0


@pytest.mark.timeout(200)
def test_a_mistake_in_the_input_is_told_once_and_does_not_count(
    world: World, tmp_path: Path
) -> None:
    store = ShardStore(world.shards)
    text = store.validation.read_bytes()
    damaged = world.shards / "validation.parquet"
    command = start(world, tmp_path)
    until(lambda: len(command.ranks()) == 2)
    try:
        damaged.write_bytes(text[:-1])
        code, said = command.ended()
    finally:
        damaged.write_bytes(text)
    assert code == 2, said
    assert said.count("run preprocess") == 1 and "Traceback" not in said
    assert '"starts": 0' in command.directory.attempts.read_text()


@pytest.mark.timeout(200)
def test_two_nodes_train_what_two_processes_train(
    world: World, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    port = 20000 + os.getpid() % 20000
    shared = {"FASTVIDEO_NODES": "2", "FASTVIDEO_RENDEZVOUS": f"127.0.0.1:{port}"}

    def node(rank: int, launch_id: str) -> Command:
        told = {"FASTVIDEO_NODE_RANK": str(rank), "FASTVIDEO_LAUNCH_ID": launch_id}
        return start(world, tmp_path, "parallel.processes=1", environment={**shared, **told})

    alone = node(1, "job-1")  # waits for node 0
    launches = alone.directory.launches
    until((launches / "job-1" / "node-1.brief.json").exists)
    alone.signal(signal.SIGTERM)
    assert_stopped(alone, "SIGTERM", after=0)
    code, said = node(0, "job-1").ended(within_s=60)
    assert code == 75 and "node 1: stopped by SIGTERM" in said, said

    late = [node(1, "job-2")]
    time.sleep(4)
    late.append(node(0, "job-2"))
    for each in late:
        assert each.process.wait(150) == 0, each.said.read_text()
    assert late[1].started() == {}
    assert_same(tmp_path, undisturbed.run_dir)
    assert node(1, "job-2").ended()[0] == 0


@pytest.mark.timeout(300)
def test_a_signal_to_all_processes_of_two_nodes_of_a_job_stops_both_and_asks_for_more(
    world: World, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    part, run_dir = PartFolder(tmp_path / "jobs/1/train"), tmp_path / "run"
    port = 20000 + (os.getpid() + 7) % 20000

    def both(restart: int) -> list[Command]:
        """As a job of Slurm starts them: the same environment but for a counter of Slurm's."""
        shared = {
            "FASTVIDEO_JOB_DIR": str(part.root),
            "FASTVIDEO_RESTART": str(restart),
            "FASTVIDEO_NODES": "2",
            "FASTVIDEO_NODE_RANK": "$SLURM_PROCID",
            "FASTVIDEO_RENDEZVOUS": f"127.0.0.1:{port + restart}",
            "FASTVIDEO_LAUNCH_ID": f"7-{restart}",
        }
        ranks = [{"SLURM_PROCID": str(rank)} for rank in range(2)]
        one = "parallel.processes=1"
        return [start(world, run_dir, one, environment={**shared, **rank}) for rank in ranks]

    nodes = both(0)
    until(nodes[0].saved)
    for number in (signal.SIGUSR2, signal.SIGTERM):
        for pid in nodes[0].started():  # all of both
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.05)
    codes = [node.process.wait(60) for node in nodes]
    assert codes == [75, 0], [node.said.read_text() for node in nodes]
    saved = nodes[0].saved()
    first, second = read_words(part)
    assert (first.node, first.code, first.progress, first.requeue) == (0, 75, saved, True)
    assert (second.node, second.code, second.progress, second.requeue) == (1, 75, saved, False)
    assert first.message.startswith("stopped by SIG") and f"after step {saved} of" in first.message
    assert part.requeue(0).exists()

    done = both(1)
    assert [node.process.wait(120) for node in done] == [0, 0], done[0].said.read_text()
    assert_same(run_dir, undisturbed.run_dir)
    assert not part.requeue(0).exists(), "that of the start before"
    newest = newest_words(part, [0]).get(0)
    assert newest is not None and (newest.restart, newest.node, newest.code) == (1, 0, 0)
    assert newest.result == {"trained": {"transformer": {"step": 60, "ran": True}}}
