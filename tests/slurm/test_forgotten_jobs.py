# SPDX-License-Identifier: Apache-2.0
"""Arrays without accounting, and jobs that Slurm has forgotten before anybody asked."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvideo.config.cluster import Cluster
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import Array, JobSpec
from fastvideo.launch.record import Part, Record
from fastvideo.launch.render import render
from tests.slurm.lab import Lab, missing
from tests.slurm.machine import wait
from tests.slurm.slurm_conf import Settings
from tests.slurm.user_view import UID

CLUSTER = Cluster(executor="slurm", partition="main", cpus_per_task=1, signal_seconds=5)
VERB = (sys.executable, "-m", "fastvideo")
ENDS = """
import json, sys
from pathlib import Path
from fastvideo.launch import Job
status = Job(Path(sys.argv[1])).wait(timeout_s=60)
print(json.dumps(status.as_json()))
"""
"""Waits for a job as a user's program would, and tells how its parts ended."""


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    """A cluster of one node, without accounting."""
    if reason := missing():
        pytest.skip(reason)
    with Lab(settings=Settings(nodes=1, accounting=False)) as lab:
        yield lab


def submit(lab: Lab, name: str, parts: Mapping[str, tuple[str, ...]], tasks: int = 0) -> JobFolder:
    """Submit the command lines of some parts by our scripts, with our record; arrays if asked."""
    root = lab.new_folder(name)
    folder = JobFolder(root / "job")
    array = Array("--every", {task: f"{task}/{tasks}" for task in range(tasks)}) if tasks else None
    for part, (program, *command) in parts.items():
        spec = JobSpec(
            name=part,
            program=(program,),
            command=tuple(command),
            array=array,
            resources=CLUSTER.resources("train"),
            cluster=CLUSTER,
            folder=folder.part(part).root,
            work_dir=root,
        )
        spec.folder.mkdir(parents=True)
        folder.script(part).write_text(render(spec).script)
    subprocess.run(["chown", "-R", f"{UID}:{UID}", root], check=True)
    numbers = tuple(range(tasks)) if tasks else None
    record = Record("train", ("again",), "slurm", "sbatch", "login", time.time(), ())
    made = [Part(p, "train", (), numbers, 1, sbatch(lab, folder.script(p))) for p in parts]
    replace(record, parts=tuple(made)).write(folder)
    return folder


def sbatch(lab: Lab, script: Path) -> str:
    done = lab.run(["sbatch", "--parsable", script])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ended(lab: Lab, folder: JobFolder) -> dict[str, Any]:
    """By part, how a job ended; and that somebody who waits for it is told within a minute."""
    done = lab.run([sys.executable, "-c", ENDS, folder.root], timeout_s=80)
    assert done.returncode == 0, done.stderr
    parts: dict[str, Any] = json.loads(done.stdout)["parts"]
    return parts


def known(lab: Lab) -> bool:
    """Whether the controller remembers any job."""
    return bool(lab.operator(["squeue", "-h", "-t", "all"]).strip())


@pytest.mark.timeout(200)
def test_tasks_of_arrays_are_told_apart_and_jobs_that_slurm_forgot_by_what_they_said(
    bare: Lab,
) -> None:
    script = "[ $FASTVIDEO_TASK != 2 ] || kill -9 $$; sleep 1; exit $FASTVIDEO_TASK"
    array = submit(bare, "array", {"array": ("bash", "-c", script, "-")}, tasks=3)
    silent = ("bash", "-c", "exit 1")
    old = submit(bare, "old", {"spoken": (*VERB, "train", "none.yaml"), "silent": silent})

    part = ended(bare, array)["array"]
    assert part["tasks"] == {"COMPLETED": 1, "FAILED": 2}
    assert part["why"]["1"].endswith("exit code 1"), part
    assert part["why"]["2"].endswith("exit code 137, signal 9"), part

    wait(lambda: not bare.operator(["squeue", "-h"]).strip(), "the end of all", timeout_s=30)
    bare.configure(replace(bare.settings, min_job_age_s=2))
    wait(lambda: not known(bare), "Slurm to forget its jobs", timeout_s=60)
    begin_s = time.monotonic()
    assert ended(bare, array)["array"] == part, "as it was seen then"
    assert time.monotonic() - begin_s < 10
    parts = ended(bare, old)
    assert parts["spoken"]["state"] == "FAILED" and "none.yaml" in parts["spoken"]["why"]["0"]
    assert parts["silent"]["state"] == "LOST" and "left the queue" in parts["silent"]["why"]["0"]
