# SPDX-License-Identifier: Apache-2.0
"""Jobs of this machine: starts what runs them, tells how far they are, and cancels them."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from fastvideo import atomic
from fastvideo.data.gpus import listed
from fastvideo.errors import STOP_SIGNALS, UserError
from fastvideo.launch.folder import JobFolder, PartFolder
from fastvideo.launch.process import Process

GRACE_S = 60.0
"""How long tasks may take to save their state once they are asked to stop."""
POLL_S = 0.2

State = Literal["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "LOST"]


@dataclass(frozen=True)
class LocalPart:
    """A part of a job as it runs on this machine."""

    name: str
    """Unique in its job; also names its folder."""
    argv: Mapping[int, tuple[str, ...]]
    """Command line by task, with what starts a container around it; task 0 where no array is."""
    environment: Mapping[str, str]
    """Variables that are set on top of those of whoever submits."""
    work_dir: Path
    """Absolute; where it starts."""
    after: tuple[str, ...] = ()
    """Parts that have to succeed before."""
    is_array: bool = False
    """Whether its tasks have a log each."""
    gpus: int = 0
    """How many each task gets for itself."""
    parallelism: int | None = None
    """How many tasks may run at the same time; empty: as many as there are GPUs for, or one task of
    an array without."""

    @property
    def most(self) -> int:
        """How many tasks may run at the same time, whatever GPUs there are."""
        usual = 1 if self.is_array and self.gpus == 0 else len(self.argv)
        return self.parallelism or usual


@dataclass(frozen=True)
class LocalTask:
    """How far a task is."""

    state: State = "PENDING"
    """As Slurm calls it; LOST: what ran it is gone and left no word of its end."""
    reason: str = ""
    """Why, where the state alone does not say."""
    exit_code: int | None = None
    signal: int | None = None
    """What killed it."""
    pid: int | None = None
    host: str = ""
    gpus: tuple[str, ...] = ()
    """Its own, as in ``CUDA_VISIBLE_DEVICES``."""
    started: float | None = None
    """Seconds since 1970, as is ``ended``."""
    ended: float | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing changes it any more."""
        return self.state not in ("PENDING", "RUNNING")


Tasks = dict[str, dict[int, LocalTask]]
"""By part, then by the number of the task."""


@dataclass(frozen=True)
class Plan:
    """All that the process which runs a job has to know."""

    parts: tuple[LocalPart, ...]
    gpus: tuple[str, ...]
    grace_s: float

    def write(self, path: Path) -> None:
        """Write it down in ASCII, which also holds strings that are not valid Unicode."""
        value = {**vars(self), "parts": [vars(part) for part in self.parts]}
        text = json.dumps(value, default=_plain, indent=1)
        atomic.write_bytes(path, text.encode("ascii"), point="plan")

    @classmethod
    def read(cls, folder: JobFolder) -> Self | None:
        """The plan of a job; None if it was not submitted to this executor."""
        value = atomic.read_json(plan_file(folder))
        if value is None:
            return None
        return cls(tuple(map(_part, value["parts"])), tuple(value["gpus"]), value["grace_s"])


def gpu_pool(count: int, *, visible: str | None) -> tuple[str, ...]:
    """The GPUs to deal out.

    Args:
        count: How many the machine has.
        visible: ``CUDA_VISIBLE_DEVICES`` of whoever submits; if set, only these.
    """
    if visible is None:
        return tuple(map(str, range(count)))
    return tuple(dict.fromkeys(listed(visible)))[:count]


def start(
    folder: JobFolder,
    *,
    parts: Sequence[LocalPart],
    gpus: Sequence[str],
    grace_s: float = GRACE_S,
) -> int:
    """Start a process that runs the parts and outlives this one; returns at once.

    Args:
        folder: Of the job; private to the user, and fresh.
        parts: In an order in which they may run one after the other.
        gpus: What there is to deal out, see ``gpu_pool``.
        grace_s: How long cancelled tasks may take to save their state before they are killed.

    Returns:
        The id of the process.

    Raises:
        UserError: A task needs more GPUs than there are, or holds a zero character.
    """
    _check(parts, gpus)
    folder = JobFolder(folder.root.absolute())
    for part in parts:
        write_tasks(folder.part(part.name), dict.fromkeys(part.argv, LocalTask()))
    Plan(tuple(parts), tuple(gpus), grace_s).write(plan_file(folder))
    # Until it has a name itself: should we be killed in between, nobody takes the job for alive.
    Process.of(os.getpid()).write(controller_file(folder))
    pid = _spawn(folder)
    Process.of(pid).write(controller_file(folder))
    return pid


def read_local(folder: JobFolder) -> Tasks:
    """How far a local job is; empty if it is none.

    What its files say of tasks that run is believed only as long as the process that writes them
    runs itself.
    """
    plan = Plan.read(folder)
    if plan is None:
        return {}
    controller = Process.read(controller_file(folder))
    # Asked before the states are read: what it wrote last before it ended is then among them.
    alive = controller is not None and controller.runs()
    tasks = {part.name: _tasks(folder.part(part.name), part.argv) for part in plan.parts}
    if alive:
        return tasks
    if alive is None and controller is not None:
        reason = f"as of {controller.host}, which cannot be asked from {socket.gethostname()}"
        return _unless_final(tasks, reason=reason)
    reason = f"what ran the job is gone, see {_log(folder).name}; submit again"
    return _unless_final(tasks, state="LOST", reason=reason)


def cancel(folder: JobFolder, *, parts: Collection[str] = (), timeout_s: float = 90.0) -> Tasks:
    """Stop a job or some of its parts, from any machine that sees its folder, and wait for that.

    Tasks get time to save their state; those that depend on cancelled ones are cancelled as well.

    Returns:
        How far the job is then; what has not stopped within ``timeout_s`` is not final.
    """
    tasks = read_local(folder)
    named = set(parts or tasks)
    for name in named:
        cancel_file(folder.part(name)).touch()
    deadline_s = time.monotonic() + timeout_s
    while not _all_final(tasks, named) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        tasks = read_local(folder)
    return tasks


# ---------------------------------------------------------------- files


def plan_file(folder: JobFolder) -> Path:
    """What is to be run."""
    return folder.root / "local_plan.json"


def controller_file(folder: JobFolder) -> Path:
    """Which process runs it."""
    return folder.root / "controller.json"


def cancel_file(folder: PartFolder) -> Path:
    """Its presence asks for the part to be stopped."""
    return folder.root / "cancel"


def write_tasks(folder: PartFolder, tasks: Mapping[int, LocalTask]) -> None:
    """Say how far the tasks of a part are."""
    value = {str(number): asdict(task) for number, task in tasks.items()}
    atomic.write_json(folder.local, {"tasks": value}, point="local")


def _log(folder: JobFolder) -> Path:
    return folder.root / "controller.txt"


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _part(value: Mapping[str, Any]) -> LocalPart:
    read = {
        "argv": {int(task): tuple(argv) for task, argv in value["argv"].items()},
        "work_dir": Path(value["work_dir"]),
        "after": tuple(value["after"]),
    }
    return LocalPart(**{**value, **read})


def _tasks(folder: PartFolder, numbers: Collection[int]) -> dict[int, LocalTask]:
    value = atomic.read_json(folder.local) or {"tasks": {}}
    found = {int(number): _task(task) for number, task in value["tasks"].items()}
    return {number: found.get(number, LocalTask()) for number in numbers}


def _task(value: Mapping[str, Any]) -> LocalTask:
    return LocalTask(**{**value, "gpus": tuple(value["gpus"])})


def _unless_final(tasks: Tasks, *, reason: str, state: State | None = None) -> Tasks:
    def changed(task: LocalTask) -> LocalTask:
        return replace(task, reason=reason, state=state or task.state)

    return {
        name: {number: task if task.is_final else changed(task) for number, task in of_part.items()}
        for name, of_part in tasks.items()
    }


def _all_final(tasks: Tasks, names: Collection[str]) -> bool:
    return all(task.is_final for name in names for task in tasks[name].values())


# ---------------------------------------------------------------- start


def _check(parts: Sequence[LocalPart], gpus: Sequence[str]) -> None:
    before: set[str] = set()
    for part in parts:
        assert before.issuperset(part.after), f"{part.name} comes before what it needs"
        assert part.work_dir.is_absolute(), part.work_dir
        before.add(part.name)
        if part.gpus > len(gpus):
            shown = ",".join(gpus) or "none"
            raise UserError(
                f"{part.name}: gpus_per_node={part.gpus}, but GPUs to be had here are {shown}; "
                "lower it in the cluster file, or show more by CUDA_VISIBLE_DEVICES"
            )
        for value in _strings(part):
            if "\0" in value:
                raise UserError(f"{part.name}: {value!r} holds a zero character; remove it")


def _strings(part: LocalPart) -> list[str]:
    words = [word for argv in part.argv.values() for word in argv]
    return [str(part.work_dir), *words, *part.environment, *part.environment.values()]


def _spawn(folder: JobFolder) -> int:
    """Start the controller, of which no trace stays in this process, in a session of its own.

    Its signals are held back until it asks for them, so that none is lost while Python starts.
    """
    log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    held = {*STOP_SIGNALS, signal.SIGCHLD}
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-m", "fastvideo.launch.controller", str(folder.root)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, _log(folder), log, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=held,
        setsigdef=held,
    )
