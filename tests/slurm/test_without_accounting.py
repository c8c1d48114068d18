# SPDX-License-Identifier: Apache-2.0
"""A cluster without accounting: every end is told, and told correctly, within a minute."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fastvideo.config.cluster import Cluster
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import JobSpec
from fastvideo.launch.record import Part, Record
from fastvideo.launch.render import render
from tests.slurm.lab import Lab, missing
from tests.slurm.machine import wait
from tests.slurm.slurm_conf import Settings
from tests.slurm.user_view import UID

WAIT = """
import json, sys, time
from pathlib import Path
from fastvideo.launch import Job
begin_s = time.monotonic()
status = Job(Path(sys.argv[1])).wait(timeout_s=150)
(part,) = status.parts.values()
task = part.tasks[0]
print(json.dumps({
    "state": str(status.state), "restarts": task.restarts, "why": part.why(0),
    "over": time.time(),
}))
"""
"""Waits for a job as a user's program would, and tells how it ended and when that was known."""


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    """A cluster of its own, without accounting."""
    if reason := missing():
        pytest.skip(reason)
    with Lab(settings=Settings(accounting=False)) as lab:
        yield lab


@dataclass
class Submitted:
    """A job of a stand-in program, and who waits for it."""

    lab: Lab
    folder: JobFolder
    slurm_id: str
    waiting: "subprocess.Popen[str]"
    node: str = ""

    def runs(self) -> bool:
        """Whether it runs, and where."""
        text = self.lab.operator(["squeue", "-h", "-j", self.slurm_id, "-o", "%T %N"], check=False)
        state, _, self.node = text.strip().partition(" ")
        return state == "RUNNING"

    def ended(self, *, within_s: float) -> dict[str, object]:
        """What the waiting program said."""
        out, err = self.waiting.communicate(timeout=within_s)
        assert self.waiting.returncode == 0, err
        found: dict[str, object] = json.loads(out)
        return found


def submit(lab: Lab, name: str, program: str, *, minutes: int = 10, **options: str) -> Submitted:
    """Submit ``program`` by our script, with our record, through sbatch."""
    root = lab.new_folder(name)
    folder = JobFolder(root / "job")
    cluster = Cluster(
        executor="slurm",
        partition="main",
        time_minutes=minutes,
        cpus_per_task=1,
        signal_seconds=5,
        options={"nodelist" if key == "on" else key: value for key, value in options.items()},
    )
    spec = JobSpec(
        name="train",
        command=(program,),
        resources=cluster.resources("train"),
        cluster=cluster,
        folder=folder.part("train").root,
        work_dir=root,
        program=("bash", "-c"),
    )
    spec.folder.mkdir(parents=True)
    script = folder.script("train")
    script.write_text(render(spec).script)
    subprocess.run(["chown", "-R", f"{UID}:{UID}", root], check=True)
    done = lab.run(["sbatch", "--parsable", script])
    assert done.returncode == 0, done.stderr
    part = Part("train", "train", (), None, 1, done.stdout.strip())
    record = Record("train", ("again",), "slurm", "sbatch", "login", time.time(), (part,))
    record.write(folder)
    (root / "wait.py").write_text(WAIT)
    command = lab.user_command([sys.executable, root / "wait.py", folder.root])
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Submitted(lab, folder, part.slurm_id or "", waiting)


@pytest.mark.timeout(300)
def test_every_end_is_told_correctly_within_a_minute(bare: Lab) -> None:
    assert "disabled" in bare.run(["sacct"]).stderr
    done = submit(bare, "done", "sleep 1")
    late = submit(
        bare, "late", "trap '' TERM USR2; sleep 300 & wait; sleep 300", minutes=1, on="n1"
    )
    killed = submit(bare, "killed", "kill -9 $$")
    failed = submit(bare, "failed", "exit 3")
    cancelled = submit(bare, "cancelled", "sleep 300", on="n1")
    lost = submit(bare, "lost", "sleep 300", on="n2")
    again = submit(bare, "again", "[ $FASTVIDEO_RESTART = 1 ] || sleep 300", exclude="n1,n2")
    running = (late, cancelled, lost, again)
    for job in running:
        wait(job.runs, f"{job.folder.root}", timeout_s=60)

    told = time.time()
    assert bare.run(["scancel", cancelled.slurm_id]).returncode == 0
    found = cancelled.ended(within_s=60)
    assert found["state"] == "CANCELLED" and time.time() - told < 60
    assert done.ended(within_s=60)["state"] == "COMPLETED"
    found = killed.ended(within_s=60)
    assert found["state"] == "FAILED" and "137" in str(found["why"]), found
    found = failed.ended(within_s=60)
    assert found["state"] == "FAILED" and "3" in str(found["why"]), found

    # Only one of the two may be queued again.
    bare.operator(["scontrol", "update", f"jobid={lost.slurm_id}", "requeue=0"])
    cut = time.time()
    for job in (lost, again):
        bare.kill_node(job.node)
    noticed = lost.ended(within_s=120)
    assert noticed["state"] == "NODE_FAIL", noticed
    assert float(str(noticed["over"])) - cut < 60
    found = again.ended(within_s=120)
    assert found["state"] == "COMPLETED" and found["restarts"] == 1, found

    found = late.ended(within_s=200)
    assert found["state"] == "TIMEOUT", found
