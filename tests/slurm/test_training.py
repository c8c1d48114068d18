# SPDX-License-Identifier: Apache-2.0
"""Training on two nodes of a real Slurm, whatever happens to the job."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastvideo.errors import EXIT_STOPPED
from fastvideo.launch.folder import PartFolder
from tests.experts_job import equal
from tests.records import exact
from tests.slurm.lab import Lab
from tests.slurm.trainings import Training, lay_out
from tests.slurm.user_view import CHECKOUT

LAST_STEP = 60


def preempt(training: Training) -> None:
    """A job of more priority takes the nodes."""
    nodes = f"--nodelist={training.ask('%N')}"
    how = ["--partition=high", "--exclusive", "--output=/dev/null", nodes, "--wrap", "true"]
    assert training.lab.run(["sbatch", *how]).returncode == 0


def preempt_with_user_signal(training: Training) -> None:
    training.lab.configure(replace(training.lab.settings, preempt_user_signal=True))
    preempt(training)


def queue_again(training: Training) -> None:
    assert training.lab.run(["scontrol", "requeue", training.job]).returncode == 0


def near_its_limit(training: Training) -> None:
    """Slurm looks every half minute."""
    training.lab.operator(["scontrol", "update", f"jobid={training.job}", "timelimit=1"])


GRACEFUL = [
    (preempt, "SIGTERM"),
    (preempt_with_user_signal, "SIGUSR2"),
    (queue_again, "SIGTERM"),
    (near_its_limit, "SIGUSR2"),
]


def stopped(training: Training, signal: str, restart: int) -> None:
    """It has saved its last step, and said so."""
    word = training.word(restart)
    assert (word.code, word.requeue) == (EXIT_STOPPED, True)
    assert f"stopped by {signal} after step {training.step} of" in word.message
    assert training.saved == training.step == word.progress


def goes_on(training: Training, *, restart: int, beyond: int, before: str) -> None:
    """It started again and trains where it was: no step is lost, none is done twice."""
    training.wait(lambda: training.restarts == restart, f"restart {restart}")
    training.lab.operator(["scontrol", "update", f"jobid={training.job}", "timelimit=30"])
    training.wait_for_steps(4, beyond=beyond)
    assert training.metrics.startswith(before + "\n")


@pytest.mark.timeout(500)
def test_no_disturbance_changes_what_is_trained(lab: Lab, folder: Path) -> None:
    training = lay_out(lab, folder)
    training.submit()
    training.wait_for_steps(4, beyond=0)
    for restart, (disturb, signal) in enumerate(GRACEFUL):
        disturb(training)
        said = training.part.word(0, restart, 0)
        training.wait(said.exists, f"the end after {disturb.__name__}")
        before, last = training.metrics, training.step
        stopped(training, signal, restart)
        goes_on(training, restart=restart + 1, beyond=last, before=before)
        first, second = (training.word(restart, node=node) for node in (0, 1))
        assert (second.code, second.requeue) == (EXIT_STOPPED, False)
        assert second.message == first.message
        # Slurm queues what its operator asks for itself.
        renamed = training.part.requeued(0, restart).exists()
        assert renamed == (disturb is not queue_again)

    last = -(-training.step // 10) * 10 + 20
    other = Training(lab, folder, folder / "undisturbed", (f"train.steps={last}",))
    lose_power(training, restart=len(GRACEFUL), meanwhile=other.submit)
    assert f"queued again {len(GRACEFUL) + 1} times" in training.call("status")
    training.wait(lambda: training.saved >= last, f"checkpoint {last}", within_s=90)
    end_by_file(training, restart=len(GRACEFUL) + 1)
    same(training, other, step=last)


def lose_power(training: Training, *, restart: int, meanwhile: Callable[[], None]) -> None:
    """A node dies: what was done since the last save is done again, with the same losses."""
    name = training.lab.run(["scontrol", "show", "hostnames", training.ask("%N")]).stdout.split()[1]
    saved = training.saved
    training.wait(lambda: saved < training.saved <= training.step - 3, "steps after a save")
    training.lab.kill_node(name)
    meanwhile()
    training.wait(lambda: training.ask("%T") != "RUNNING", "the node's death to be seen")
    before, saved = training.metrics, training.saved
    last = training.step
    assert saved < last < saved + 10
    training.lab.start_node(name)
    kept = before.splitlines()[:saved]
    goes_on(training, restart=restart + 1, beyond=last, before="\n".join(kept))
    again = training.records(until=last)
    assert again == [exact(json.loads(line)) for line in before.splitlines()]
    assert training.metrics.splitlines()[saved:last] != before.splitlines()[saved:]  # other times


def end_by_file(training: Training, *, restart: int) -> None:
    """A person ends it: it is not queued again."""
    done = training.lab.run(["touch", training.run_dir / "STOP"])
    assert done.returncode == 0
    training.wait(lambda: training.ask("%T") not in ("RUNNING", "COMPLETING"), "its end")
    assert training.ask("%T") == "FAILED"
    word = training.word(restart)
    assert (word.code, word.requeue) == (EXIT_STOPPED, False)
    assert training.saved == training.step
    assert "stopped by the STOP file" in training.call("status")


def same(training: Training, other: Training, *, step: int) -> None:
    other.wait(lambda: other.ask("%T") == "COMPLETED", "its end", within_s=90)
    records = training.records(until=step)
    assert [record["step"] for record in records] == [*range(1, step + 1)]
    assert records == other.records(until=step)
    found, wanted = training.numbers(step), other.numbers(step)
    assert found.keys() == wanted.keys()
    assert all(equal(found[name], value) for name, value in wanted.items())


@pytest.mark.timeout(300)
def test_a_failure_is_told_and_what_is_cancelled_stays_so(lab: Lab, folder: Path) -> None:
    training = lay_out(lab, folder)
    training.submit()
    training.wait_for_steps(12, beyond=0)
    training.kill_rank(3)
    training.wait(lambda: training.ask("%T") == "FAILED", "its end")
    reason = r"rank 3 \(process \d+ on n2\) was killed by SIGKILL"
    assert re.match(reason, training.word(0).message)
    said = training.call("status")
    assert re.search(reason, said) and f"to go on: fastvideo train {training.recipe}" in said
    assert (training.saved, training.restarts) == (10, 0)

    training.submit()
    training.wait_for_steps(3, beyond=training.step)
    training.call("cancel")
    training.wait(lambda: training.ask("%T") == "CANCELLED", "its end")
    assert (training.restarts, training.word(0).code) == (0, EXIT_STOPPED)
    assert training.saved == training.step


@pytest.mark.timeout(300)
def test_scripts_of_the_suite_lead_from_clips_to_videos(lab: Lab, folder: Path) -> None:
    training = lay_out(lab, folder, shards=False)
    program = f"{sys.executable} -m fastvideo"
    variables = {"ALL": "--cpus-per-task=2", "TASKS": "2", "TRAIN": "--nodes=2"}
    script = CHECKOUT / "slurm/pipeline.sh"
    environment = {**variables, "FASTVIDEO": program, "OMP_NUM_THREADS": "1"}
    words = [str(training.recipe), f"train.steps={LAST_STEP}"]
    done = lab.run([script, *words], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    last = replace(training, job=done.stdout.split()[4].rstrip(":"))
    training.job = lab.operator(["squeue", "-h", "-n", "train", "-o", "%i"]).strip()
    training.part = PartFolder(folder / f"slurm-{training.job}")

    training.wait_for_steps(3, beyond=0)
    lab.operator(["scancel", "--signal=USR2", training.job])
    training.wait(training.part.word(0, 0, 0).exists, "its end")
    before = training.metrics
    stopped(training, "SIGUSR2", 0)
    training.wait(lambda: last.ask("%T") == "COMPLETED", "the last job's end", within_s=90)
    assert training.restarts == 1
    assert training.part.requeued(0, 0).exists()
    assert training.saved == LAST_STEP
    assert training.metrics.startswith(before + "\n")
    videos = sorted(path.name for path in training.run_dir.glob("generate/export/*.mp4"))
    assert videos == ["0000.mp4", "0001.mp4"]
