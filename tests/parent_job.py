# SPDX-License-Identifier: Apache-2.0
"""Real ``fastvideo train`` commands of several processes for tests, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.state import RunDir, TrainDir
from tests.experts_job import equal, numbers, records
from tests.tiny_world import World

STEPS = 60
LONG = (
    f"train.steps={STEPS}",
    "train.checkpoint.every_steps=5",
    "train.checkpoint.keep_last=1",
    "train.heldout.every_steps=30",
)
"""Long enough that a signal sent after the first checkpoint finds it at work."""


@dataclass(frozen=True)
class Command:
    """A running ``fastvideo train``."""

    process: "subprocess.Popen[bytes]"
    run_dir: Path
    said: Path

    def ended(self, *, within_s: float = 120) -> tuple[int, str]:
        """Wait for it: the exit code and what it said; nothing that it started is left."""
        code = self.process.wait(within_s)
        text = self.said.read_text()
        assert self.started() == {}, text
        return code, text

    def killed(self) -> None:
        """Wait until it and all that it started are gone."""
        assert self.process.wait(30) == -signal.SIGKILL
        until(lambda: not self.started(), within_s=5)

    def started(self) -> dict[int, str]:
        """Command lines of the processes that work in the run's folder, by process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"{self.run_dir}/train/" in command:
                found[int(folder.name)] = command
        return found

    def agent(self) -> int:
        """The process that runs torchrun."""
        (pid,) = (pid for pid, command in self.started().items() if "train.node.agent" in command)
        return pid

    def ranks(self) -> list[int]:
        """The processes that train, in the order in which they were started."""
        return sorted(
            pid for pid, command in self.started().items() if "train.node.rank" in command
        )

    def signal(self, number: signal.Signals, *pids: int) -> None:
        """Send a signal to some processes, or to the command's own."""
        for pid in pids or (self.process.pid,):
            os.kill(pid, number)

    @property
    def directory(self) -> TrainDir:
        """What is trained."""
        return RunDir(self.run_dir).training()

    def saved(self) -> int:
        """The newest complete checkpoint."""
        return max(self.directory.complete_checkpoints(), default=0)


def start(
    world: World,
    run_dir: Path,
    *overrides: str,
    processes: int = 2,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Start ``fastvideo train`` with ``processes`` processes on this node."""
    said = world.root / f"said-{time.monotonic_ns()}.txt"
    command = [sys.executable, "-m", "fastvideo", "train", str(world.recipe), *LONG]
    changes = (f"run_dir={run_dir}", f"parallel.processes={processes}", *overrides)
    with open(said, "wb") as file:
        process = subprocess.Popen(
            [*command, *changes],
            stdout=subprocess.DEVNULL,
            stderr=file,
            env={**os.environ, **(environment or {})},
        )
    return Command(process, run_dir, said)


def until(condition: Callable[[], object], *, within_s: float = 120) -> None:
    """Wait for a condition."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def results(run_dir: Path) -> list[dict[str, Any]]:
    """What was recorded, without times."""
    names = {"step", "samples", "loss", "grad_norm", "lr", "heldout_loss"}
    found = records(run_dir, "transformer")
    return [{name: record[name] for name in sorted(names & record.keys())} for record in found]


def assert_same(run_dir: Path, expected: Path) -> None:
    """Equal records and, bit for bit, equal numbers of the last checkpoint."""
    assert RunDir(run_dir).training().complete_checkpoints()[-1] == STEPS
    assert results(run_dir) == results(expected)
    found, wanted = (numbers(folder, "transformer", STEPS) for folder in (run_dir, expected))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert equal(found[name], value), name
