# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on one machine: a controller, a login node and nodes in namespaces of their own.

Needs root and the packages of ``PACKAGES``. Tests use the fixture ``lab``; by hand:
``python -m tests.slurm.lab start|stop|status|shell|run CMD...|kill-node N|start-node N``.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.slurm.accounting import start_accounting
from tests.slurm.machine import (
    NAMESPACES,
    SYSTEM_PATH,
    LabError,
    Machine,
    load_machine,
    start_machine,
    wait,
)
from tests.slurm.slurm_conf import (
    CONTROLLER,
    LOGIN,
    Settings,
    address,
    hosts,
    write_slurm_conf,
)
from tests.slurm.user_view import CHECKOUT, UID, USER, give_own_tmp, show_to_user

PACKAGES = "slurmctld slurmd slurm-client munge iproute2 slurmdbd mariadb-server"
TOOLS = "slurmctld slurmd sbatch munged ip slurmdbd mariadbd mariadb-install-db nsenter setpriv"
# Not /tmp, of which each node has its own.
PARENT = Path("/var/tmp")
PREFIX = "fastvideo-slurm-lab"
BY_HAND = PARENT / PREFIX
FOLDERS = ("ctld", "etc", "gpu", "home", "log", "machines", "mysql", "shown", "slurm")


class Lab:
    """A cluster and its folder, which says all that is known of it.

    Used as a context manager it starts on entering, and ends on leaving or with this process,
    however that dies.
    """

    def __init__(self, folder: Path | None = None, *, settings: Settings | None = None) -> None:
        self.folder = folder or _free_folder()
        self.settings = settings or Settings()
        self.home = self.folder / "home"
        """Home of the user: a file system that all machines share, at the same path as here."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, *, lasting: bool = False) -> None:
        """Start everything and wait until all nodes are idle.

        Args:
            lasting: Whether the cluster outlives this process.

        Raises:
            LabError: It does not come up; says what the logs say.
        """
        sweep()
        self.stop()
        umask = os.umask(0o022)
        try:
            self._start(lasting)
        except (LabError, OSError, subprocess.SubprocessError) as error:
            said = self._ends_of_logs()
            self.stop()
            raise LabError(f"{error}\n{said}") from error
        except BaseException:
            self.stop()
            raise
        finally:
            os.umask(umask)

    def stop(self) -> None:
        """Leave nothing of the cluster, in whatever state it is."""
        if controller := load_machine(self.folder / "machines", name="ctl"):
            controller.kill()
            wait(lambda: not controller.is_alive, "the controller's end", timeout_s=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node as the ordinary user.

        Args:
            argv: The command; programs of the checkout's environment are found.
            cwd: Where; the user's home by default.
            env: Variables besides those of a login.
            timeout_s: After which it is killed.
        """
        command = self.user_command(argv, cwd=cwd, env=env)
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )

    def user_command(
        self,
        argv: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        machine: str = "login",
    ) -> list[str]:
        """What runs ``argv`` as the ordinary user."""
        variables = {
            "PATH": f"{CHECKOUT}/.venv/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "USER": USER,
            "LOGNAME": USER,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            **(env or {}),
        }
        ids = (f"--reuid={UID}", f"--regid={UID}", "--clear-groups")
        settings = [f"{name}={value}" for name, value in variables.items()]
        become = [
            "setpriv",
            *ids,
            "--pdeathsig",
            "KILL",
            "env",
            "-i",
            f"--chdir={cwd or self.home}",
        ]
        return self.machine(machine).command([*become, *settings, *argv])

    def machine(self, name: str) -> Machine:
        """``ctl``, ``login``, ``n1``, ...

        Raises:
            LabError: It is not running.
        """
        machine = load_machine(self.folder / "machines", name=name)
        if machine is None or not machine.is_alive:
            raise LabError(f"{name} is not running; start the cluster or that node")
        return machine

    def operator(self, argv: Sequence[str | Path], *, check: bool = True) -> str:
        """Run a command as the cluster's operator, root on the controller."""
        return self.machine("ctl").run(argv, check=check)

    def kill_node(self, name: str) -> None:
        """Cut the power of ``n2``: everything on it ends at once, and it answers no more."""
        self.machine(name).kill()
        # What is left of its network would be in the way of its next start.
        self.operator(["ip", "link", "del", name], check=False)

    def start_node(self, name: str) -> None:
        """Switch ``n2`` on."""
        node = start_machine(name, inside=self.machine("ctl"))
        node.save(self.folder / "machines")
        self._connect(node, address(name))
        give_own_tmp(node, folder=self.folder)
        node.run(["slurmd", "-N", name])

    def configure(self, settings: Settings) -> None:
        """Change what ``scontrol reconfigure`` can change."""
        self.settings = settings
        write_slurm_conf(settings, folder=self.folder)
        self.operator(["scontrol", "reconfigure"])

    def new_folder(self, name: str) -> Path:
        """Make a folder of the user, which all machines see."""
        path = self.home / f"{name}-{len(list(self.home.iterdir()))}"
        path.mkdir()
        os.chown(path, UID, UID)
        return path

    def nodes(self) -> dict[str, str]:
        """States of the nodes by name, as in sinfo: ``idle``, ``mixed``, ``down*``, ..."""
        lines = self.operator(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %t"], check=False)
        return dict(fields for line in lines.splitlines() if len(fields := line.split()) == 2)

    def wait_until_idle(self, *, timeout_s: float) -> None:
        """Wait until all nodes wait for work.

        Raises:
            LabError: They do not in time; says what they do.
        """
        idle = dict.fromkeys(self.settings.node_names, "idle")
        try:
            wait(lambda: self.nodes() == idle, "idle nodes", timeout_s=timeout_s)
        except LabError as error:
            raise LabError(f"{error}: {self.nodes()}") from None

    def clear(self) -> None:
        """Cancel everything and bring back all nodes, so that the next test finds a new cluster."""
        self.operator(["scancel", "--user", USER])
        for name in self.settings.node_names:
            machine = load_machine(self.folder / "machines", name=name)
            if machine is None or not machine.is_alive:
                self.start_node(name)
        wait(
            lambda: not self.operator(["squeue", "-h"]).strip(),
            "the end of all jobs",
            timeout_s=self.settings.kill_wait_s + 30,
        )
        for name, state in self.nodes().items():
            if state.startswith(("drain", "down", "inval")):
                resume = ["scontrol", "update", f"nodename={name}", "state=resume"]
                self.operator(resume, check=False)
        self.wait_until_idle(timeout_s=30)

    def _start(self, lasting: bool) -> None:
        self.folder.mkdir(mode=0o755)
        for name in FOLDERS:
            (self.folder / name).mkdir()
        os.chown(self.home, UID, UID)
        for gpu in range(self.settings.gpus):
            os.mknod(self.folder / "gpu" / f"fake{gpu}", 0o020666, os.makedev(1, 3))
        (self.folder / "etc" / "hosts").write_text(hosts(self.settings))
        write_slurm_conf(self.settings, folder=self.folder)
        controller = start_machine("ctl", lasting=lasting)
        controller.save(self.folder / "machines")
        self._set_up(controller)
        if self.settings.accounting:
            start_accounting(controller, folder=self.folder)
        controller.run(["slurmctld", "-c"])
        login = start_machine("login", inside=controller)
        login.save(self.folder / "machines")
        self._connect(login, LOGIN)
        give_own_tmp(login, folder=self.folder)
        for node in self.settings.node_names:
            self.start_node(node)
        self.wait_until_idle(timeout_s=15)

    def _set_up(self, controller: Machine) -> None:
        """Network, users, munge: what all the others need."""
        script = f"""\
link set lo up
link add lab type bridge
addr add {CONTROLLER}/24 dev lab
link set lab up
"""
        controller.run(["ip", "-batch", "-"], text=script)
        show_to_user(controller, folder=self.folder)
        controller.run(["mount", "--bind", self.folder / "slurm", "/etc/slurm"])
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(128))
        names = {"key": "key", "socket": "sock", "pid": "pid", "log": "log", "seed": "seed"}
        files = {
            f"--{option}{'' if option == 'socket' else '-file'}": self.folder / f"munge.{end}"
            for option, end in names.items()
        }
        controller.run(["munged", *(f"{option}={path}" for option, path in files.items())])

    def _connect(self, machine: Machine, ip: str) -> None:
        # Seen from the controller's network, but with the host's numbers of processes.
        network = f"nsenter --target={self.machine('ctl').pid} --net -- ip -batch -"
        cable = f"link add {machine.name} type veth peer name eth0 netns {machine.pid}"
        plug = f"link set {machine.name} master lab up"
        subprocess.run(
            network.split(),
            env={**os.environ, "PATH": SYSTEM_PATH},
            input=f"{cable}\n{plug}\n",
            text=True,
            check=True,
        )
        script = f"""\
link set lo up
link set eth0 up
addr add {ip}/24 dev eth0
route add default via {CONTROLLER}
"""
        machine.run(["ip", "-batch", "-"], text=script)

    def _ends_of_logs(self) -> str:
        logs = [*sorted((self.folder / "log").glob("*.log")), self.folder / "munge.log"]
        texts = {log.name: log.read_text(errors="replace") for log in logs if log.exists()}
        return "\n".join(
            f"== {name}\n" + "\n".join(text.splitlines()[-15:]) for name, text in texts.items()
        )


def missing() -> str:
    """Why no cluster can be started here, empty if one can."""
    if os.geteuid() != 0:
        return "only root can start a cluster; run the tests as root"
    absent = [tool for tool in TOOLS.split() if not shutil.which(tool, path=SYSTEM_PATH)]
    if absent:
        install = f"apt-get install --no-install-recommends {PACKAGES}"
        return f"no {', '.join(absent)}; {install}"
    try_out = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return try_out.stderr.strip()


def sweep() -> None:
    """Remove the folders of clusters whose processes were killed."""
    for folder in PARENT.glob(f"{PREFIX}-*-*"):
        owner = folder.name.split("-")[-2]
        if owner.isdigit() and not Path("/proc", owner).exists():
            Lab(folder).stop()


def _free_folder() -> Path:
    """A name for a cluster of this process, which tells later ones whether it still lives."""
    taken = len(list(PARENT.glob(f"{PREFIX}-{os.getpid()}-*")))
    return PARENT / f"{PREFIX}-{os.getpid()}-{taken}"


def main(argv: Sequence[str]) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.slurm.lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("start", "stop", "status", "shell"):
        verbs.add_parser(verb)
    for verb in ("kill-node", "start-node"):
        verbs.add_parser(verb).add_argument("node", help="n1, n2, ...")
    verbs.add_parser("run").add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    if reason := missing():
        print(f"no cluster: {reason}", file=sys.stderr)
        return 2
    lab = Lab(BY_HAND)
    try:
        return _do(arguments, lab)
    except LabError as error:
        print(f"no cluster: {error}", file=sys.stderr)
        return 1


def _do(arguments: argparse.Namespace, lab: Lab) -> int:
    match arguments.verb:
        case "start":
            lab.start(lasting=True)
            print(lab.operator(["sinfo", "-N", "-l"]), end="")
            print(f"The user {USER} has the home {lab.home}, which all nodes share. Next:")
            print("  make slurm-lab ARGS=shell    a shell on the login node")
            print("  make slurm-lab ARGS=stop     the end of it all")
        case "stop":
            lab.stop()
        case "status":
            print(lab.operator(["sinfo", "-N", "-l"]), lab.operator(["squeue"]), sep="\n", end="")
        case "kill-node":
            lab.kill_node(arguments.node)
        case "start-node":
            lab.start_node(arguments.node)
        case _:
            command = arguments.command if arguments.verb == "run" else ["bash"]
            return subprocess.run(lab.user_command(command)).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
