# SPDX-License-Identifier: Apache-2.0
"""What it costs to ask how 10,000 tasks of an array are, against submitit's own watcher.

    python benchmarks/bench_launch.py
    python benchmarks/bench_launch.py --json benchmarks/results/NAME.json

Slurm is a stand-in that prints what sacct prints: so this is our side of the costs, with the start
of the program that prints. Medians; ours is timed with its import as well, in a process of its own,
as a command on a login node would pay for it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmInfoWatcher

from fastvideo.launch.watch import Watcher

ROOT = Path(__file__).parents[1]
JOB = "4711"
ENDED, RUNNING = 6000, 64
SACCT = """#!/bin/sh
case "$*" in
*DerivedExitCode*) cat "{folder}/ours.txt" ;;
*) cat "{folder}/submitit.txt" ;;
esac
"""
QUEUE = """#!/bin/sh
cat "{folder}/squeue.txt"
"""
PROCESS = """
import sys
from fastvideo.launch.watch import Watcher
states = Watcher().look([sys.argv[1]], tasks={sys.argv[1]: range(int(sys.argv[2]))})
assert len(states[sys.argv[1]]) == int(sys.argv[2])
assert "torch" not in sys.modules
"""


def main() -> None:
    """Measure and print; every variant has to count the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", type=int, default=10_000, help="of the array")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stand_in(Path(folder), arguments.tasks)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        found = status(arguments.tasks, arguments.rounds)
    for name, seconds in found.items():
        print(f"{arguments.tasks} tasks, {name:<34} {seconds:7.3f} s")
    if arguments.json:
        figures = {"machine": machine(), "tasks": arguments.tasks, "seconds": found}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def stand_in(folder: Path, num_tasks: int) -> None:
    """Write tools that tell of an array of which some ended, some run and the others wait."""
    for name, script in (("sacct", SACCT), ("squeue", QUEUE), ("scontrol", QUEUE)):
        (folder / name).write_text(script.format(folder=folder))
        (folder / name).chmod(0o755)
    ours, theirs, queue = [], ["JobID|State|NodeList"], []
    for task in range(num_tasks):
        state = state_of(task)
        if state == "PENDING":
            queue.append(f"{JOB}_{task}|PENDING|0|0||0:00|JobArrayTaskLimit")
            continue
        node = f"n{task % 64}"
        ours.append(f"{JOB}_{task}|{state}|0:0|0:0|60|1795943743|{node}|None")
        theirs.append(f"{JOB}_{task}|{state}|{node}")
        theirs += [f"{JOB}_{task}.{step}|{state}|{node}" for step in ("batch", "0")]
        if state == "RUNNING":
            queue.append(f"{JOB}_{task}|RUNNING|0|0|{node}|1:00|None")
    waiting = f"{JOB}_[{ENDED + RUNNING}-{num_tasks - 1}%{RUNNING}]"
    ours.append(f"{waiting}|PENDING|0:0|0:0|0|1795943743|None assigned|None")
    theirs.append(f"{waiting}|PENDING|None assigned")
    for name, lines in (("ours", ours), ("submitit", theirs), ("squeue", queue)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def state_of(task: int) -> str:
    """How the array is."""
    if task < ENDED:
        return "COMPLETED"
    return "RUNNING" if task < ENDED + RUNNING else "PENDING"


def status(num_tasks: int, rounds: int) -> dict[str, float]:
    """Seconds of one look at all tasks."""
    expected = Counter(state_of(task) for task in range(num_tasks))

    def ours() -> Counter[str]:
        states = Watcher().look([JOB], tasks={JOB: range(num_tasks)})
        return Counter(str(state.state) for state in states[JOB].values())

    def submitit() -> Counter[str]:
        watcher = SlurmInfoWatcher()
        for task in range(num_tasks):
            watcher.register_job(f"{JOB}_{task}")
        watcher.update()
        tasks = range(num_tasks)
        return Counter(watcher.get_state(f"{JOB}_{task}", mode="cache") for task in tasks)

    def process() -> Counter[str]:
        command = [sys.executable, "-c", PROCESS, JOB, str(num_tasks)]
        subprocess.run(command, cwd=ROOT, check=True)
        return expected

    variants: dict[str, Callable[[], Counter[str]]] = {
        "ours (sacct and squeue)": ours,
        "ours, start and imports included": process,
        "submitit (sacct alone)": submitit,
    }
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            begin_s = time.perf_counter()
            counted = variant()
            found[name].append(time.perf_counter() - begin_s)
            if counted != expected:
                raise RuntimeError(f"{name} counted {counted} instead of {expected}")
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
