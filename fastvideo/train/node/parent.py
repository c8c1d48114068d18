# SPDX-License-Identifier: Apache-2.0
"""The node's parent: runs torchrun in a child of its own, passes stops on, and judges the end."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
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
from fastvideo.train.node.nodes import LAUNCH_ID, Nodes
from fastvideo.train.node.outcome import failed_nodes, first_failure, read_outcomes
from fastvideo.train.node.pulse import (
    ENDED,
    START,
    Beat,
    Pulses,
    Standstill,
    describe_hang,
    patience,
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
        log = launch.node_log(nodes.rank)
        with _agent(str(path.resolve()), log=log, pulses=pulses) as agent:
            minutes = work.recipe.train.watch.hang_minutes
            watch = _Watch(launch, nodes, pulses, hang_minutes=minutes)
            while _runs(agent) and not watch.is_over():
                _pass_on(stop, work, launch, pulses)
            code = agent.poll()
        words = pulses.words()
    if stop.reason():
        stop.honour()
    _judge(_End(launch, nodes, code, words), finished)


def _pass_on(stop: StopRequest, work: Work, launch: LaunchDir, pulses: Pulses) -> None:
    """Tell the processes of a request to stop; end at once what has not begun to train.

    Of several nodes each would have to know that, so they begin first and stop together.
    """
    if stop.signalled and not launch.stop.exists():
        atomic.write_bytes(launch.stop, stop.signalled.encode(), point="stop")
    reason = stop.reason()
    starting = all(beat.phase == START for beat in pulses.read().values())
    if reason and starting and work.nodes.count == 1:
        stop.honour()
        raise stopped(work.directory, reason, steps=work.recipe.train.steps)


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
    if launch.brief(nodes.rank).exists():
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
        self._minutes, self._still = hang_minutes, Standstill(every_s=LOOK_S)
        self._next_look_s, self._others_failed_s = 0.0, float("inf")

    def is_over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        beats = {r: beat for r, beat in self._pulses.read().items() if beat.phase != ENDED}
        starting = any(beat.phase == START for beat in beats.values())
        minutes = patience(self._minutes, starting=starting)
        if self._still.look(beats) > minutes * 60:
            self._tell_hang(beats, minutes)
            return True
        now_s = time.monotonic()
        if self._nodes.count > 1 and now_s >= self._next_look_s:
            self._next_look_s = now_s + OTHERS_S
            if failed_nodes(self._launch) - {self._nodes.rank}:
                self._others_failed_s = min(self._others_failed_s, now_s)
        return now_s - self._others_failed_s > GRACE_S

    def _tell_hang(self, beats: dict[int, Beat], minutes: float) -> None:
        message = describe_hang(beats, minutes=minutes)
        logs = self._launch.rank_log(min(beats)).with_name("rank-*.log")
        report = {"message": f"{message}; where each of them is: {logs}", "time": time.time()}
        atomic.write_json(self._launch.hang(self._nodes.rank), report, point="hang")
        for beat in beats.values():
            if atomic.running(beat.pid):
                os.kill(beat.pid, signal.SIGUSR1)  # writes the stacks to its log
        time.sleep(1)


@dataclass(frozen=True)
class _End:
    """What a launch left."""

    launch: LaunchDir
    nodes: Nodes
    code: int | None
    """The agent's exit code, None if it had to be killed."""
    words: Sequence[str]
    """Last words of this node's processes."""


def _judge(end: _End, finished: Callable[[], bool]) -> None:
    """Return if all is done, else raise what became of it; saved state counts, not exit codes."""
    launch, code = end.launch, end.code
    deadline_s = time.monotonic() + (OTHERS_S if end.nodes.count > 1 else 0)
    while True:  # what other nodes wrote is seen a little later
        outcomes = read_outcomes(launch, end.words)
        if finished():
            if code != 0:
                logger.warning("a process failed after all was saved; see %s", launch.root)
            return
        # Rank 0 writes what makes a checkpoint complete, so its word is enough.
        if 0 in outcomes and outcomes[0].kind == "stopped":
            raise Stopped(outcomes[0].message)
        if time.monotonic() >= deadline_s:
            break
        time.sleep(0.5)
    if code is not None and code < 0:
        raise Failed(
            f"the process that starts all others of this node was killed by "
            f"{signal.Signals(-code).name}, most likely out of host memory; see {launch.root}"
        )
    raise first_failure(launch, end.words)
