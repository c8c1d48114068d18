# SPDX-License-Identifier: Apache-2.0
"""What jobs cost: to submit, to ask how 10,000 tasks are, and to deal shards out to nodes.

    python benchmarks/bench_launch.py
    python benchmarks/bench_launch.py --only lab --json benchmarks/results/NAME.json

``submit`` and ``status``: Slurm is a stand-in that prints what sbatch and sacct print, so this is
our side of the costs, with the start of the program that prints. Medians; commands are timed whole,
in processes of their own, as on a login node. ``status`` also times submitit's own watcher.

``lab``: shards that only sleep, several per task, on the test cluster of ``tests/slurm``, which
takes root; what is on top of work divided by slots is the cost of coordination.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from submitit.slurm.slurm import SlurmInfoWatcher

from fastvideo.launch.folder import JobFolder
from fastvideo.launch.record import Part, Record
from fastvideo.launch.watch import Watcher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the test cluster is no part of the package
WAN = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-06,
    "rope_max_seq_len": 1024,
}
"""Wan2.1 1.3B: submitting looks at its layout."""
HEAVY = ("torch", "numpy", "pyarrow", "diffusers")
SUBMITTED_S = 1795943743
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
SBATCH = """#!/bin/sh
case $1 in
--parsable) echo 4711 ;;
*) echo "Submitted batch job 4711" ;;
esac
"""
CONFIG = """#!/bin/sh
echo "MaxArraySize = 1001"
"""
# A task of the test cluster: says when its program began, and sleeps for each of its shards.
SLEEPER = """#!{python} -SE
import os, sys, time
begun = time.time()
shards = []
for part in sys.argv[-1].split(","):
    first, _, last = part.partition("-")
    shards += range(int(first), int(last or first) + 1)
for _ in shards:
    time.sleep({seconds})
with open(os.environ["FASTVIDEO_JOB_DIR"] + "/times-" + os.environ["FASTVIDEO_TASK"], "w") as file:
    print(os.environ["SCRIPT_BEGAN"], begun, time.time(), len(shards), file=file)
"""
# When the task's first process began, which under submitit is the parent's parent of this shell.
SETUP = """
pid=$$
while read -r _ _ _ parent _ <"/proc/$pid/stat" && [[ $(<"/proc/$parent/comm") != slurmstepd ]]; do
  pid=$parent
done
read -r -a fields <"/proc/$pid/stat"
read -r up _ </proc/uptime
SCRIPT_BEGAN=$(awk "BEGIN { printf \\"%.2f\\", $EPOCHREALTIME - $up + ${fields[21]} / 100 }")
export SCRIPT_BEGAN
"""
HAND_OVER = """
import sys
from pathlib import Path
from fastvideo.config.cluster import Cluster
from fastvideo.launch import slurm
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import JobSpec
from fastvideo.launch.stages import dealt
root, through = Path(sys.argv[1]), sys.argv[2]
cluster = Cluster.load(root / "cluster.yaml")
folder = JobFolder(root / through)
spec = JobSpec(
    name="preprocess", command=("preprocess", "recipe.yaml"), cluster=cluster,
    resources=cluster.resources("preprocess"), folder=folder.part("preprocess").root,
    work_dir=root, program=(str(root / "sleeper"),),
    array=dealt(range(int(sys.argv[3])), per_task=int(sys.argv[4]), parallelism=None),
)
folder.root.mkdir()
slurm.submit(folder, [spec], through=through, submitted=lambda *_: None)
"""


def main() -> None:
    """Measure and print; every variant has to count the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", type=int, default=10_000, help="of the array")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("submit", "status", "lab"), help="one of the three")
    parser.add_argument("--json", type=Path, help="also write the figures there, beside others")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        if arguments.only in (None, "submit"):
            found["submit_s"] = submit(Path(folder), arguments.rounds)
        if arguments.only in (None, "status"):
            stand_in(Path(folder), arguments.tasks)
            seconds = status(arguments.tasks, arguments.rounds)
            found["status_s"] = seconds | commands(Path(folder), arguments.tasks, arguments.rounds)
    if arguments.only in (None, "lab"):
        found["coordination"] = {way: coordination(way) for way in ("sbatch", "submitit")}
    print(json.dumps(found, indent=1))
    if arguments.json:
        old = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        figures = {**old, "machine": machine(), "tasks": arguments.tasks, **found}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- submit


def submit(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of ``fastvideo VERB RECIPE --cluster C``."""
    for name, script in (("sbatch", SBATCH), ("srun", SBATCH), ("scontrol", CONFIG)):
        write_program(folder / name, script)
    for name in ("sacct", "squeue", "scancel"):
        write_program(folder / name, "#!/bin/sh\n")
    lay_out(folder)
    found: dict[str, list[float]] = {}
    for attempt in range(rounds):
        for verb, way in (("train", "sbatch"), ("train", "submitit"), ("run", "submitit")):
            command = [verb, "recipe.yaml", f"run_dir={way}-{verb}-{attempt}"]
            command += ["--cluster", f"{way}.yaml"]
            seconds = timed([sys.executable, "-m", "fastvideo", *command], folder)
            found.setdefault(f"{verb} through {way}", []).append(seconds)
            if attempt == 0:
                refuse_heavy(command, folder)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def lay_out(folder: Path) -> None:
    """A recipe, the configuration of its model, and cluster files."""
    model = folder / "model" / "transformer"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(WAN))
    (folder / "prompts.json").write_text('["a dog"]')
    tree = {
        "model": {"family": "wan2.1", "path": "model"},
        "source": {"kind": "merged", "path": "clips"},
        "shards": {"path": "shards"},
        "run_dir": "run",
        "generate": {"prompts": "prompts.json"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    for way in ("sbatch", "submitit"):
        (folder / f"{way}.yaml").write_text(f"executor: slurm\nsubmitter: {way}\n")


def timed(command: list[str], folder: Path) -> float:
    """Seconds that a command takes."""
    begin_s = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=here())
    return time.perf_counter() - begin_s


def here() -> dict[str, str]:
    """An environment in which this checkout is what runs."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def refuse_heavy(command: list[str], folder: Path) -> None:
    """Submitting must not import what a login node has not."""
    start = [sys.executable, "-X", "importtime", "-m", "fastvideo", *command, "--force"]
    done = subprocess.run(start, cwd=folder, check=True, capture_output=True, text=True, env=here())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    if imported & set(HEAVY) or "fastvideo.launch.submission" not in imported:
        raise RuntimeError(f"{command}: imports {imported & set(HEAVY)}")


# ---------------------------------------------------------------- status


def commands(folder: Path, num_tasks: int, rounds: int) -> dict[str, float]:
    """Seconds of ``fastvideo status`` as a whole, while the array runs and when it is over."""
    lay_out(folder)
    part = Part("preprocess", "preprocess", (), tuple(range(num_tasks)), 1, JOB)
    job = JobFolder(folder / "run" / "jobs" / "20261129-093000-preprocess-1f3a")
    Record(
        verb="preprocess",
        command=("fastvideo", "preprocess", "recipe.yaml"),
        executor="slurm",
        submitter="sbatch",
        host="login",
        created=SUBMITTED_S,
        parts=(part,),
    ).write(job)
    for task in range(ENDED):
        word = {"verb": "preprocess", "code": 0, "message": "", "result": {"filled": [task]}}
        more = {"progress": 1, "requeue": False, "host": "n1", "time": 0.0}
        path = job.part("preprocess").word(task, 0, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(word | more))
    command = [sys.executable, "-m", "fastvideo", "status", "recipe.yaml", "--json"]
    shown = subprocess.run(command, cwd=folder, check=True, capture_output=True, env=here())
    counted = json.loads(shown.stdout)["jobs"][0]["parts"]["preprocess"]["tasks"]
    expected = Counter(state_of(task) for task in range(num_tasks))
    if counted != expected:
        raise RuntimeError(f"status counted {counted} instead of {expected}")
    found = {"command, running": statistics.median(timed(command, folder) for _ in range(rounds))}
    rows = (f"{JOB}_{task}|FAILED|1:0|0:0|60|{SUBMITTED_S}|n1|None" for task in range(num_tasks))
    (folder / "ours.txt").write_text("\n".join(rows) + "\n")
    found["command, all failed, first look"] = timed(command, folder)
    later = [timed(command, folder) for _ in range(rounds)]
    return {**found, "command, all failed, later": statistics.median(later)}


def stand_in(folder: Path, num_tasks: int) -> None:
    """Write tools that tell of an array of which some ended, some run and the others wait."""
    for name, script in (("sacct", SACCT), ("squeue", QUEUE), ("scontrol", QUEUE)):
        write_program(folder / name, script.format(folder=folder))
    ours, theirs, queue = [], ["JobID|State|NodeList"], []
    for task in range(num_tasks):
        state = state_of(task)
        if state == "PENDING":
            queue.append(f"{JOB}_{task}|PENDING|0|0||0:00|JobArrayTaskLimit")
            continue
        node = f"n{task % 64}"
        ours.append(f"{JOB}_{task}|{state}|0:0|0:0|60|{SUBMITTED_S}|{node}|None")
        theirs.append(f"{JOB}_{task}|{state}|{node}")
        theirs += [f"{JOB}_{task}.{step}|{state}|{node}" for step in ("batch", "0")]
        if state == "RUNNING":
            queue.append(f"{JOB}_{task}|RUNNING|0|0|{node}|1:00|None")
    waiting = f"{JOB}_[{ENDED + RUNNING}-{num_tasks - 1}%{RUNNING}]"
    ours.append(f"{waiting}|PENDING|0:0|0:0|0|{SUBMITTED_S}|None assigned|None")
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


# ---------------------------------------------------------------- coordination


def coordination(
    way: str, *, shards: int = 64, per_task: int = 4, seconds: float = 5.0
) -> dict[str, float]:
    """How much longer than work divided by slots an array takes on four nodes."""
    from tests.slurm.lab import Lab, wait
    from tests.slurm.user_view import UID

    tasks = shards // per_task
    with Lab() as lab:
        root = lab.new_folder("coordination")
        cluster = {"executor": "slurm", "partition": "main", "cpus_per_task": 1}
        cluster["setup"] = str(root / "setup.sh")
        (root / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        (root / "setup.sh").write_text(SETUP)
        write_program(root / "sleeper", SLEEPER.format(python=sys.executable, seconds=seconds))
        os.chown(root, UID, UID)
        numbers = (str(shards), str(per_task))
        begin_s = time.time()
        handed = lab.run(["python", "-c", HAND_OVER, root, way, *numbers], cwd=ROOT)
        if handed.returncode != 0:
            raise RuntimeError(handed.stderr)
        submitted_s = time.time()
        folder = root / way / "preprocess"
        wait(lambda: len(list(folder.glob("times-*"))) == tasks, "the tasks", timeout_s=300)
        time.sleep(0.5)
        rows = [[float(word) for word in path.read_text().split()] for path in folder.glob("t*-*")]
        slots = lab.settings.nodes * lab.settings.cpus
    began, programs, ends, counts = zip(*rows, strict=True)
    starts = sorted(program - script for script, program in zip(began, programs, strict=True))
    if sum(counts) != shards:
        raise RuntimeError(f"{sum(counts)} shards instead of {shards}")
    work_s = shards * seconds / slots
    span_s = max(ends) - submitted_s
    start_s = statistics.median(starts)
    return {
        "slots": slots,
        "tasks": tasks,
        "work_divided_by_slots_s": work_s,
        "submit_s": submitted_s - begin_s,
        "from_submission_to_the_last_end_s": span_s,
        "start_of_a_program_s": start_s,
        "slowest_start_s": starts[-1],
        "overhead_percent": 100 * (span_s - starts[-1] - work_s) / work_s,
        "overhead_with_starts_percent": 100 * (span_s - work_s) / work_s,
    }


def write_program(path: Path, text: str) -> None:
    """Write something that can be run."""
    path.write_text(text)
    path.chmod(0o755)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "submitit": version("submitit"),
        "pydantic": version("pydantic"),
        "slurm": _slurm(),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _slurm() -> str:
    """The version of the test cluster."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if not (found := shutil.which("slurmctld", path=path)):
        return ""
    return subprocess.run([found, "-V"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
