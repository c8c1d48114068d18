# SPDX-License-Identifier: Apache-2.0
"""Runs a local job: ``python -m fastvideo.launch.controller JOB_FOLDER``, alone and in no terminal.

It starts what may run, deals GPUs out, and says in the folder of each part how far its tasks are.
"""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastvideo.errors import EXIT_DONE, EXIT_STOPPED, EXIT_UNEXPECTED, STOP_SIGNALS
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.local import (
    LocalPart,
    LocalTask,
    Plan,
    State,
    cancel_file,
    controller_file,
    write_tasks,
)
from fastvideo.launch.process import Process
from fastvideo.train.node import lifeline
from fastvideo.train.node.nodes import VARIABLES

WAKE_S = 0.5
"""How often it looks for requests, which no signal tells of."""
SIGNALS = {*STOP_SIGNALS, signal.SIGCHLD}


def main() -> int:
    """Run the job of the folder that the command line names."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    folder = JobFolder(Path(sys.argv[1]))
    Process.of(os.getpid()).write(controller_file(folder))
    plan = Plan.read(folder)
    assert plan is not None, folder.root
    return EXIT_DONE if Controller(folder, plan).run() else EXIT_UNEXPECTED


def judge(code: int, *, cancelled: bool) -> tuple[State, str]:
    """State and reason of a task that ended with ``code``, which is below 0 for a signal."""
    if code == EXIT_DONE:
        return "COMPLETED", ""
    if code == EXIT_STOPPED:
        state: State = "CANCELLED" if cancelled else "FAILED"
        return state, "stopped, state saved; submit again"
    if cancelled:
        return "CANCELLED", "killed, as it did not stop in time" if code == -signal.SIGKILL else ""
    if code == -signal.SIGKILL:
        return "FAILED", "killed by SIGKILL; the kernel does so when memory runs out"
    return "FAILED", "" if code > 0 else f"killed by {signal.Signals(-code).name}"


@dataclass
class _Running:
    """A part and what happens to it."""

    part: LocalPart
    tasks: dict[int, LocalTask]
    processes: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    kill_at_s: float | None = None
    """When what is left of it is killed; not None: it was cancelled."""
    is_saved: bool = False

    def put(self, number: int, task: LocalTask) -> None:
        self.tasks[number] = task
        self.is_saved = False

    def pending(self) -> list[int]:
        return [number for number, task in self.tasks.items() if task.state == "PENDING"]

    @property
    def has_failed(self) -> bool:
        return any(task.is_final and task.state != "COMPLETED" for task in self.tasks.values())

    @property
    def has_succeeded(self) -> bool:
        return all(task.state == "COMPLETED" for task in self.tasks.values())


class Controller:
    """The parts of a job and their processes, all of them its own children.

    One thread, and no signal handlers: signals wait until the loop takes them, so that none comes
    between two steps of it.
    """

    def __init__(self, folder: JobFolder, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._parts = {
            part.name: _Running(part, dict.fromkeys(part.argv, LocalTask())) for part in plan.parts
        }

    def run(self) -> bool:
        """Run until nothing is left to do; returns whether all tasks succeeded."""
        while True:
            self._obey()
            self._reap()
            self._give_up_dependents()
            self._start_what_fits()
            over = all(task.is_final for part in self._parts.values() for task in _of(part))
            self._save(is_last=over)
            if over:
                return all(part.has_succeeded for part in self._parts.values())
            received = signal.sigtimedwait(SIGNALS, WAKE_S)
            if received is not None and received.si_signo in STOP_SIGNALS:
                print(f"{signal.Signals(received.si_signo).name}: cancelling", flush=True)
                self._cancel(*self._parts)

    def _obey(self) -> None:
        for name in self._parts:
            if cancel_file(self._folder.part(name)).exists():
                self._cancel(name)

    def _cancel(self, *names: str) -> None:
        for part in map(self._parts.__getitem__, names):
            if part.kill_at_s is None:
                part.kill_at_s = time.monotonic() + self._plan.grace_s
                for process in part.processes.values():
                    _signal(process, signal.SIGTERM)
            for number in part.pending():
                part.put(number, _cancelled("cancelled before it started"))

    def _reap(self) -> None:
        for part in self._parts.values():
            overdue = part.kill_at_s is not None and time.monotonic() > part.kill_at_s
            for number, process in list(part.processes.items()):
                if overdue:
                    _signal(process, signal.SIGKILL)
                code = _end(process)
                if code is not None:
                    del part.processes[number]
                    part.put(number, _ended(part, number, code))

    def _give_up_dependents(self) -> None:
        for part in self._parts.values():  # in order, so that it passes on down the chain
            failed = [name for name in part.part.after if self._parts[name].has_failed]
            for number in part.pending() if failed else []:
                part.put(number, _cancelled(f"needs {', '.join(failed)}"))

    def _start_what_fits(self) -> None:
        for part in self._parts.values():
            if not all(self._parts[name].has_succeeded for name in part.part.after):
                continue
            for number in part.pending():
                free = self._free_gpus()
                if len(part.processes) >= part.part.most or part.part.gpus > len(free):
                    break
                self._start(part, number, gpus=free[: part.part.gpus])

    def _free_gpus(self) -> tuple[str, ...]:
        tasks = (task for part in self._parts.values() for task in _of(part))
        taken = {gpu for task in tasks if task.state == "RUNNING" for gpu in task.gpus}
        return tuple(gpu for gpu in self._plan.gpus if gpu not in taken)

    def _start(self, part: _Running, number: int, *, gpus: tuple[str, ...]) -> None:
        task = LocalTask(host=socket.gethostname(), gpus=gpus, started=time.time())
        try:
            process = self._spawn(part.part, number, gpus=gpus)
        except OSError as error:
            reason = f"could not be started: {error}"
            part.put(number, replace(task, state="FAILED", reason=reason, ended=time.time()))
            return
        part.processes[number] = process
        part.put(number, replace(task, state="RUNNING", pid=process.pid))

    def _spawn(
        self, part: LocalPart, number: int, *, gpus: tuple[str, ...]
    ) -> "subprocess.Popen[bytes]":
        folder = self._folder.part(part.name)
        ours = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        of_task = {
            "FASTVIDEO_JOB_DIR": str(folder.root),
            "FASTVIDEO_TASK": str(number),
            "FASTVIDEO_RESTART": "0",
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        }
        with open(folder.log(number if part.is_array else None), "ab") as log:
            return subprocess.Popen(
                part.argv[number],
                cwd=part.work_dir,
                env={**ours, **part.environment, **of_task},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(_as_child, os.getpid()),
            )

    def _save(self, *, is_last: bool) -> None:
        """Write down what changed; a full disk must not end the tasks, so it is tried again."""
        for name, part in self._parts.items():
            if part.is_saved:
                continue
            try:
                write_tasks(self._folder.part(name), part.tasks)
                part.is_saved = True
            except OSError as error:
                if is_last:
                    raise
                print(f"{name}: states not written: {error}", flush=True)


def _of(part: _Running) -> list[LocalTask]:
    return list(part.tasks.values())


def _cancelled(reason: str) -> LocalTask:
    return LocalTask(state="CANCELLED", reason=reason, ended=time.time())


def _ended(part: _Running, number: int, code: int) -> LocalTask:
    state, reason = judge(code, cancelled=part.kill_at_s is not None)
    return replace(
        part.tasks[number],
        state=state,
        reason=reason,
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        ended=time.time(),
    )


def _as_child(parent: int) -> None:
    lifeline.die_with(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit code of a task that ended, after what it left running in its group is killed.

    Its process is reaped last: as long as it is not, the group's number belongs to nobody else.
    """
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    _signal(process, signal.SIGKILL)
    return process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    # Processes that change their user, as containers may, cannot be signalled.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
