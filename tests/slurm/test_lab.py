# SPDX-License-Identifier: Apache-2.0
"""The test cluster is what other tests take it for."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, sweep
from tests.slurm.machine import LabError, wait
from tests.slurm.slurm_conf import Settings
from tests.slurm.user_view import CHECKOUT, UID


def submit(lab: Lab, *options: str, command: str) -> str:
    done = lab.run(["sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", command])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(lab: Lab, job: str) -> str:
    return lab.run(["squeue", "-h", "-t", "all", "-o", "%T", "-j", job]).stdout.strip()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_every_node_has_its_own_name_address_and_temporary_folder(lab: Lab, folder: Path) -> None:
    script = """
hostname -I >addresses.$(hostname)
touch /tmp/of.$(hostname) /dev/shm/of.$(hostname)
sleep 1
ls /tmp /dev/shm >seen.$(hostname)
"""
    done = lab.run(["srun", "--nodes=4", "bash", "-c", script], cwd=folder)
    assert done.returncode == 0, done.stderr
    for number in range(1, 5):
        assert (folder / f"addresses.n{number}").read_text().split() == [f"10.77.0.{10 + number}"]
        assert (folder / f"seen.n{number}").read_text().count("of.") == 2
    assert (folder / "seen.n1").stat().st_uid == UID


def test_an_ordinary_user_runs_the_checkout(lab: Lab) -> None:
    program = "import os, fastvideo; print(os.getuid(), os.uname().nodename, fastvideo.__path__[0])"
    done = lab.run(["srun", "--nodelist=n3", "python", "-c", program])
    assert done.stdout.split() == [str(UID), "n3", str(CHECKOUT / "fastvideo")], done.stderr
    done = lab.run(["touch", CHECKOUT / "README.md"])
    assert "Permission denied" in done.stderr


def test_gpus_are_handed_out(lab: Lab) -> None:
    done = lab.run(["srun", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"])
    assert done.stdout == "0,1\n", done.stderr
    assert lab.run(["sbatch", "--gpus-per-node=3", "--wrap", "true"]).returncode != 0


def test_a_dead_node_loses_its_job_to_another_and_comes_back(lab: Lab, folder: Path) -> None:
    command = f"echo ${{SLURM_RESTART_COUNT:-0}} $(hostname) >>{folder}/starts; sleep 100"
    job = submit(lab, "--requeue", command=command)
    wait(lambda: read(folder / "starts").endswith("\n"), "the first start", timeout_s=10)
    dead = read(folder / "starts").split()[-1]
    lab.kill_node(dead)
    with pytest.raises(LabError, match="is not running"):
        lab.machine(dead)
    wait(lambda: lab.nodes()[dead] == "down*", "the node's death to be seen", timeout_s=40)
    wait(lambda: state(lab, job) == "RUNNING", "another start", timeout_s=20)
    sacct = ["sacct", "-n", "-X", "-D", "-P", "-o", "state", "-j", job]
    wait(lambda: lab.run(sacct).stdout.split() == ["NODE_FAIL", "RUNNING"], "sacct", timeout_s=10)
    wait(lambda: read(folder / "starts").count("\n") == 2, "the second start", timeout_s=10)
    restart, node = read(folder / "starts").splitlines()[1].split()
    assert restart == "1"
    assert node != dead
    lab.start_node(dead)
    wait(lambda: lab.nodes()[dead] == "idle", "the node", timeout_s=10)


@pytest.mark.parametrize("user_signal", [False, True])
def test_preemption_sends_the_signal_that_the_cluster_is_set_to(
    lab: Lab, folder: Path, user_signal: bool
) -> None:
    lab.configure(replace(lab.settings, preempt_user_signal=user_signal, grace_s=5))
    listen = 'for s in TERM USR2; do trap "echo $s >>got; exit" $s; done; touch up; sleep 60 & wait'
    job = submit(
        lab,
        "--signal=USR2@20",
        "--nodes=1",
        "--exclusive",
        "--nodelist=n2",
        f"--chdir={folder}",
        command=f"srun bash -c '{listen}'",
    )
    wait((folder / "up").exists, "the first job", timeout_s=10)
    submit(lab, "--partition=high", "--exclusive", "--nodelist=n2", command="true")
    wait(lambda: read(folder / "got").endswith("\n"), "a signal", timeout_s=10)
    assert read(folder / "got") == ("USR2\n" if user_signal else "TERM\n"), job


def test_sacct_knows_every_end(lab: Lab) -> None:
    jobs = {
        "COMPLETED|0:0": submit(lab, command="true"),
        "FAILED|3:0": submit(lab, command="exit 3"),
        "CANCELLED by 4242|0:0": submit(lab, "--hold", command="true"),
    }
    lab.run(["scancel", jobs["CANCELLED by 4242|0:0"]])
    ask = ["sacct", "-n", "-X", "-P", "-o", "state,exitcode", "-j"]

    def ends() -> list[str]:
        return [lab.run([*ask, job]).stdout.strip() for job in jobs.values()]

    wait(lambda: ends() == list(jobs), "these ends", timeout_s=10)


def test_without_accounting_sacct_says_so_and_squeue_still_knows() -> None:
    with Lab(settings=Settings(nodes=1, accounting=False)) as lab:
        done = lab.run(["sacct"])
        assert (done.returncode, done.stderr) == (1, "Slurm accounting storage is disabled\n")
        job = submit(lab, command="exit 3")
        wait(lambda: state(lab, job) == "FAILED", "its end", timeout_s=10)


def test_nothing_is_left_when_the_process_that_started_it_is_killed() -> None:
    program = """
from tests.slurm.lab import Lab, Settings
lab = Lab(settings=Settings(nodes=1, accounting=False))
lab.start()
print(lab.folder, lab.machine("n1").pid, flush=True)
input()
"""
    maker = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    folder, pid = maker.stdout.readline().split()
    maker.kill()
    maker.wait()
    wait(lambda: not Path(f"/proc/{pid}/exe").exists(), "its node's end", timeout_s=10)
    sweep()
    assert not Path(folder).exists()


def test_a_start_that_fails_shows_the_logs_and_leaves_nothing() -> None:
    lab = Lab(settings=Settings(nodes=1, accounting=False, max_array=-1))
    with pytest.raises(LabError, match=r"(?s)slurmctld.*== munge.log"):
        lab.start()
    assert not lab.folder.exists()
