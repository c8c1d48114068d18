# SPDX-License-Identifier: Apache-2.0
"""The node's parent: runs torchrun in a child of its own, passes stops on, and judges the end."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import atomic
from fastvideo.config.recipe import Recipe
from fastvideo.errors import Failed, Stopped, UserError
from fastvideo.log import logger
from fastvideo.state import TrainDir
from fastvideo.train.node import lifeline
from fastvideo.train.node.brief import Brief, LaunchDir
from fastvideo.train.node.nodes import LAUNCH_ID, RENDEZVOUS_S, Nodes
from fastvideo.train.node.outcome import (
    Outcome,
    early_end,
    failed_nodes,
    first_failure,
    is_broken_by_stop,
    parse_words,
    read_outcomes,
)
from fastvideo.train.node.pulse import (
    ENDED,
    SAVE_FACTOR,
    START,
    START_MINUTES,
    Beat,
    Patience,
    Pulses,
    Standstill,
    describe_hang,
)
from fastvideo.train.stop import StopRequest, stopped

KEPT_LAUNCHES = 5
LOOK_S = 0.25
OTHERS_S = 5.0
"""Between looks for failures of other nodes, whose files lie on a shared file system."""
GRACE_S = 15.0
"""How long the processes of a node may live on after those of another one failed."""


@dataclass(frozen=True)
class Work:
    """What the processes of this node, together with those of others, are to train."""

    recipe: Recipe
    directory: TrainDir
    about: dict[str, Any]
    """What checkpoints say of themselves, as ``worker.train`` takes it."""
    processes: int
    """On this node."""
    nodes: Nodes

    @property
    def is_for_one(self) -> bool:
        """Whether one process does it all."""
        return self.processes * self.nodes.count == 1


def train(work: Work, *, stop: StopRequest, finished: Callable[[], bool]) -> None:
    """Train one transformer in processes of their own.

    Args:
        work: What to do.
        stop: Passed on to the processes.
        finished: Looks at the saved state, which decides, whatever became of the processes.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        UserError: One of the processes found a mistake in the input.
        Failed: The first thing that went wrong, with the process it happened to.
    """
    nodes = work.nodes
    launch = _new_launch(work.directory, nodes)
    with Pulses(work.processes) as pulses:
        path = launch.brief(nodes.rank)
        _brief(work, launch, pulses=pulses.path).write(path)
        where = "this node" if nodes.count == 1 else f"each of {nodes.count} nodes"
        logger.info("%d processes on %s; logs in %s", work.processes, where, launch.root)
        _await_node_0(stop, work, launch)
        asked_s = None
        log = launch.node_log(nodes.rank)
        with _agent(str(path.resolve()), log=log, pulses=pulses) as agent:
            minutes = work.recipe.train.watch.hang_minutes
            watch = _Watch(launch, nodes, pulses, hang_minutes=minutes)
            while _runs(agent) and not watch.is_over():
                _pass_on(stop, work, launch, pulses)
                asked_s = asked_s or (time.time() if stop.reason() else None)
            code = agent.poll()
        words = pulses.words()
    if reason := stop.reason():
        stop.honour()
    _judge(_End(work, launch, code, words, reason, asked_s or time.time()), finished)


def _await_node_0(stop: StopRequest, work: Work, launch: LaunchDir) -> None:
    """Wait until node 0 lets others hold the run's lock, as the processes of this node will."""
    deadline_s = time.monotonic() + RENDEZVOUS_S
    while not launch.brief(0).exists():
        _end_at_once(stop, work)
        if failed_nodes(launch):
            raise early_end(launch) or first_failure(launch)
        if time.monotonic() > deadline_s:
            raise Failed(f"waited {RENDEZVOUS_S // 60} min; {_absent([0], launch)}")
        time.sleep(LOOK_S)


def _absent(nodes: Sequence[int], launch: LaunchDir) -> str:
    names = " and ".join(f"node {node}" for node in nodes)
    return (
        f"{names} did not come: no word of it is in {launch.root}; start all nodes with the same "
        f"run_dir and {LAUNCH_ID}, and see what it said"
    )


def _end_at_once(stop: StopRequest, work: Work) -> None:
    """Honour a stop where nothing has begun to train."""
    if reason := stop.reason():
        stop.honour()
        raise stopped(work.directory, reason, steps=work.recipe.train.steps)


def _pass_on(stop: StopRequest, work: Work, launch: LaunchDir, pulses: Pulses) -> None:
    """Tell the processes of a request to stop; end at once what has not begun to train."""
    if stop.signalled and not launch.stop.exists():
        atomic.write_bytes(launch.stop, stop.signalled.encode(), point="stop")
    if _is_starting(pulses.read().values()):
        _end_at_once(stop, work)


def _is_starting(beats: Iterable[Beat]) -> bool:
    """Whether none of the processes has begun to train."""
    return all(beat.phase == START for beat in beats)


def _brief(work: Work, launch: LaunchDir, *, pulses: str) -> Brief:
    transformer = work.directory.root.name
    # The second expert meets at a port of its own: that of the first may be on its way out.
    expert = list(work.recipe.transformers).index(transformer)
    return Brief(
        recipe=work.recipe.model_dump(mode="json"),
        transformer=transformer,
        about=work.about,
        folder=str(launch.root.resolve()),
        processes=work.processes,
        nodes=work.nodes.shifted(expert),
        pulses=pulses,
        parent=os.getpid(),
    )


def _new_launch(directory: TrainDir, nodes: Nodes) -> LaunchDir:
    """A folder for this launch; node 0 removes those of old ones."""
    name = nodes.launch_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    launch = LaunchDir(directory.launches / name)
    if launch.brief(nodes.rank).exists() or launch.ended(nodes.rank).exists():
        raise UserError(
            f"{LAUNCH_ID}={name}: was used before, see {launch.root}; each start needs a new one"
        )
    launch.root.mkdir(parents=True, exist_ok=True)
    if nodes.rank == 0:
        old = sorted(directory.launches.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for folder in [folder for folder in old if folder != launch.root][: 1 - KEPT_LAUNCHES]:
            shutil.rmtree(folder, ignore_errors=True)
    return launch


@contextmanager
def _agent(brief: str, *, log: Path, pulses: Pulses) -> Iterator["subprocess.Popen[bytes]"]:
    """The process that runs torchrun; at the end it and all it started are gone."""
    agent = lifeline.start("fastvideo.train.node.agent", [brief], log=log)
    try:
        yield agent
    finally:
        lifeline.end(agent, known=[beat.pid for beat in pulses.read().values()])


def _runs(agent: "subprocess.Popen[bytes]") -> bool:
    try:
        agent.wait(LOOK_S)
    except subprocess.TimeoutExpired:
        return True
    return False


class _Watch:
    """Looks for processes that hang, here, and for failures elsewhere that end this node too."""

    def __init__(
        self, launch: LaunchDir, nodes: Nodes, pulses: Pulses, *, hang_minutes: float
    ) -> None:
        self._launch, self._nodes, self._pulses = launch, nodes, pulses
        self._patience, self._still = Patience(hang_minutes), Standstill(every_s=LOOK_S)
        self._next_look_s, self._others_failed_s = 0.0, float("inf")

    def is_over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        said = self._pulses.read()
        beats = {rank: beat for rank, beat in said.items() if beat.phase != ENDED}
        minutes = self._patience.minutes(beats)
        if not said and self._nodes.count > 1:
            minutes += RENDEZVOUS_S / 60
        if self._still.look(beats or {-1: "nobody"}) > minutes * 60:
            if beats:
                self._tell_hang(beats, minutes)
            elif not said:
                log = self._launch.node_log(self._nodes.rank)
                self._tell(f"no process of this node began within {minutes:g} min; see {log}")
            return True
        return self._is_over_elsewhere(GRACE_S if not _is_starting(said.values()) else 0.0)

    def _is_over_elsewhere(self, grace_s: float) -> bool:
        now_s = time.monotonic()
        if self._nodes.count > 1 and now_s >= self._next_look_s:
            self._next_look_s = now_s + OTHERS_S
            if failed_nodes(self._launch) - {self._nodes.rank}:
                self._others_failed_s = min(self._others_failed_s, now_s)
        return now_s - self._others_failed_s >= grace_s

    def _tell(self, message: str) -> None:
        report = {"message": message, "time": time.time()}
        atomic.write_json(self._launch.hang(self._nodes.rank), report, point="hang")

    def _tell_hang(self, beats: dict[int, Beat], minutes: float) -> None:
        logs = self._launch.rank_log(min(beats)).with_name("rank-*.log")
        self._tell(f"{describe_hang(beats, minutes=minutes)}; where each of them is: {logs}")
        for beat in beats.values():
            if atomic.running(beat.pid):
                os.kill(beat.pid, signal.SIGUSR1)  # writes the stacks to its log
        time.sleep(1)


@dataclass(frozen=True)
class _End:
    """What a launch left."""

    work: Work
    launch: LaunchDir
    code: int | None
    """The agent's exit code, None if it had to be killed."""
    words: Sequence[str]
    """Last words of this node's processes."""
    reason: str | None
    """Why it was asked to stop."""
    asked_s: float
    """When it was, seconds of the Unix epoch."""


def _judge(end: _End, finished: Callable[[], bool]) -> None:
    """Return if all is done, else raise what became of it; saved state counts, not exit codes."""
    nodes, own = end.work.nodes, _agreed(end)
    if nodes.rank > 0 and own and own.kind in ("finished", "stopped"):
        hang_minutes = end.work.recipe.train.watch.hang_minutes
        _await_rank_0(end.launch, minutes=max(hang_minutes * SAVE_FACTOR, START_MINUTES))
    deadline_s = time.monotonic() + (OTHERS_S if nodes.count > 1 else 0)
    while True:  # what other nodes wrote is seen a little later
        if finished() or (own and own.kind == "finished" and nodes.rank > 0):
            if end.code != 0:
                logger.warning("a process failed after all was saved; see %s", end.launch.root)
            return
        # Rank 0 writes what makes a checkpoint complete, so its word is enough.
        for outcome in (read_outcomes(end.launch, end.words).get(0), own):
            if outcome and outcome.kind == "stopped":
                raise Stopped(outcome.message, by_person=outcome.by_person)
        if time.monotonic() >= deadline_s:
            raise _failure(end)
        time.sleep(0.5)


def _await_rank_0(launch: LaunchDir, *, minutes: float) -> None:
    """Let node 0 end first, which has more to do.

    srun with ``--kill-on-bad-exit`` or ``--wait`` ends all nodes with, or soon after, the first.
    """
    deadline_s = time.monotonic() + minutes * 60
    while not (launch.outcome(0).exists() or 0 in failed_nodes(launch)):
        if time.monotonic() > deadline_s:
            logger.warning("no word of rank 0 within %g min; see %s", minutes, launch.root)
            return
        time.sleep(0.5)


def _agreed(end: _End) -> Outcome | None:
    """How all processes of this node ended, where they agree: they finish and stop together."""
    told = list(parse_words(end.words).values())
    alike = len({outcome.kind for outcome in told}) == 1
    return told[0] if alike and len(told) == end.work.processes else None


def _failure(end: _End) -> Stopped | UserError | Failed:
    launch = end.launch
    if end.code is not None and end.code < 0:
        return Failed(
            f"the process that starts all others of this node was killed by "
            f"{signal.Signals(-end.code).name}, most likely out of host memory; see {launch.root}"
        )
    if early := early_end(launch):
        return early
    failure = first_failure(launch, end.words)
    directory = end.work.directory
    saved = max(directory.complete_checkpoints(), default=0)
    if end.reason and is_broken_by_stop(launch, end.words, asked_s=end.asked_s, saved=saved):
        logger.warning("failed while it was stopped: %s", failure)
        return stopped(directory, end.reason, steps=end.work.recipe.train.steps)
    missing = [n for n in range(end.work.nodes.count) if not launch.brief(n).exists()]
    return Failed(f"{failure}; {_absent(missing, launch)}") if missing else failure
