# SPDX-License-Identifier: Apache-2.0
"""Machines of the test cluster: namespaces that end with the process which holds them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = ("--mount", "--uts", "--net", "--ipc", "--pid")
# Daemons lie where an ordinary user's path does not lead.
SYSTEM_PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


class LabError(RuntimeError):
    """The cluster could not be started or does not do what it was told."""


@dataclass(frozen=True)
class Machine:
    """Own processes, host name, network, mounts and shared memory.

    Process 1 of it reaps what daemons leave behind, nothing else. Once it is killed, the kernel
    kills every other process in it, and the mounts and network devices go with the last of them.
    """

    name: str
    pid: int
    """Process 1, as the host numbers it."""
    started: int
    """When it started: tells it from a later process of the same number."""

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return _start_time(self.pid) == self.started

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """What runs ``argv`` inside, as root."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", *map(str, argv)]

    def run(self, argv: Sequence[str | Path], *, check: bool = True, text: str = "") -> str:
        """Run ``argv`` inside as root, with ``text`` on its standard input.

        Returns:
            What it printed, errors included.

        Raises:
            LabError: It failed, and ``check`` is set.
        """
        done = subprocess.run(
            self.command(argv),
            env={**os.environ, "PATH": SYSTEM_PATH},
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise LabError(f"{self.name}: {' '.join(map(str, argv))} failed: {done.stdout.strip()}")
        return done.stdout

    def kill(self) -> None:
        """Cut its power."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def save(self, folder: Path) -> None:
        """Write down which process it is."""
        (folder / self.name).write_text(f"{self.pid} {self.started}\n")


def load_machine(folder: Path, *, name: str) -> Machine | None:
    """Find the machine that ``Machine.save`` wrote down, dead or alive."""
    try:
        pid, started = map(int, (folder / name).read_text().split())
    except (OSError, ValueError):
        return None
    return Machine(name, pid, started)


def start_machine(name: str, *, inside: Machine | None = None, lasting: bool = False) -> Machine:
    """Start a machine, on the host or inside of another one, with which it dies.

    Args:
        name: Its host name.
        inside: The machine whose mounts it starts from.
        lasting: Whether it outlives the caller.

    Raises:
        LabError: The system does not let us; it takes root and namespaces.
    """
    init = f"hostname {name} && echo ready && exec >/dev/null; sleep infinity & wait"
    command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", init]
    if inside:
        command = inside.command(command)
    elif not lasting:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    outer = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert outer.stdout is not None
    said = outer.stdout.readline()
    if said != "ready\n":
        raise LabError(f"no namespaces for {name}: {said}{outer.stdout.read()}".strip())
    outer.stdout.close()
    pid = _child(_child(outer.pid)) if inside else _child(outer.pid)
    return Machine(name, pid, _start_time(pid))


def wait(is_so: Callable[[], bool], what: str, *, timeout_s: float) -> None:
    """Wait until something is so.

    Raises:
        LabError: It is not in time.
    """
    end = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > end:
            raise LabError(f"waited {timeout_s:g} s for {what} in vain")
        time.sleep(0.1)


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _start_time(pid: int) -> int:
    """Clock ticks since the host started, 0 for a process that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
