# SPDX-License-Identifier: Apache-2.0
"""Tests of jobs where Slurm is silent or odd, users have settings, and folders are links."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvideo.errors import Failed, UserError
from fastvideo.launch import Job, dry_run, submit
from fastvideo.launch.record import Record
from fastvideo.launch.states import State
from fastvideo.launch.statuses import statuses
from tests.submitting import Site, say


@pytest.fixture
def job(site: Site) -> Job:
    """A training, 101."""
    return submit("train", "recipe.yaml", site.cluster())


def made_earlier(job: Job) -> None:
    """Let it be submitted an hour ago."""
    replace(job.record, created=time.time() - 3600).write(job.folder)


def first(job: Job) -> State:
    """Its state at a single look, as ``fastvideo status`` takes one."""
    (status,) = statuses([job.folder])
    return status.state


# ---------------------------------------------------------------- silence


def test_the_word_of_an_earlier_start_is_not_the_end_while_nobody_answers(
    site: Site, job: Job
) -> None:
    made_earlier(job)
    say(job.folder.part("train"), code=1, message="gloo: connection reset")
    site.tools.accounting(error="sacct: error: no connection")
    site.tools.queue(error="squeue: error: timed out")
    site.tools.control(error="scontrol: error: timed out")
    assert first(job) == State.UNKNOWN
    site.tools.queue("101|RUNNING|0|1|n1|0:05|None")
    assert first(job) == State.RUNNING
    site.tools.queue("")
    site.tools.control(error="slurm_load_jobs error: Invalid job id specified")
    site.tools.accounting(error="Slurm accounting storage is disabled")
    assert first(job) == State.FAILED  # Slurm says it is gone: its word counts


def test_a_job_that_is_gone_is_lost_at_the_first_look(site: Site, job: Job) -> None:
    site.tools.accounting(error="Slurm accounting storage is disabled")
    site.tools.queue("")
    site.tools.control(error="slurm_load_jobs error: Invalid job id specified")
    assert first(job) == State.UNKNOWN  # submitted a moment ago
    made_earlier(job)
    assert first(job) == State.LOST


def test_cancelling_does_not_depend_on_what_the_queue_says(site: Site, job: Job) -> None:
    site.tools.queue(error="squeue: error: timed out")
    assert site.cli("cancel").code == 0
    assert site.stand_ins.asked("scancel") == ["101"]


def test_the_same_is_not_submitted_twice_while_nobody_answers(site: Site, job: Job) -> None:
    site.tools.queue(error="squeue: error: timed out")
    with pytest.raises(UserError, match="under way"):
        submit("train", "recipe.yaml", site.cluster())


def test_nobody_waits_where_there_is_no_slurm(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="not installed here"):
        job.wait()


def test_waiting_ends_when_it_is_to_end(site: Site, job: Job) -> None:
    site.tools.queue("101|RUNNING|0|0|n1|0:05|None")
    begin_s = time.monotonic()
    with pytest.raises(TimeoutError, match="RUNNING"):
        job.wait(timeout_s=1.2)
    assert 1.2 <= time.monotonic() - begin_s < 3


def test_records_of_an_older_job_are_not_believed_while_watching(site: Site, job: Job) -> None:
    site.tools.accounting("101|COMPLETED|0:0|0:0|61|1600000000|n1|None")
    site.tools.queue("101|PENDING|0|0||0:00|Priority")
    assert first(job) == State.PENDING
    assert not (job.folder.root / "final.json").exists()


# ---------------------------------------------------------------- odd answers


def tool(site: Site, name: str, text: str) -> None:
    path = site.stand_ins.folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "says",
    ["sbatch: Submitted batch job 77", "gr\\xfc\\xdfe\\n77", "77;cluster", "note\\n77"],
)
def test_an_id_is_found_in_what_sites_print(site: Site, says: str) -> None:
    tool(site, "sbatch", f"printf '{says}\\n'")
    job = submit("train", "recipe.yaml", site.cluster())
    assert job.record.parts[0].slurm_id == "77"


def test_what_cannot_be_taken_back_is_named_with_the_reason(site: Site) -> None:
    site.stand_ins.sbatch(refuses=3)
    tool(site, "scancel", "echo 'scancel: error: no connection' >&2; exit 1")
    with pytest.raises(UserError) as error:
        submit("run", "recipe.yaml", site.cluster())
    assert "Invalid qos specification" in str(error.value)
    assert "jobs 101, 102 were submitted and are still there" in str(error.value)
    assert "no connection" in str(error.value)


def test_a_cancel_that_fails_says_so(site: Site, job: Job) -> None:
    tool(site, "scancel", "echo 'scancel: error: no connection' >&2; exit 1")
    with pytest.raises(Failed, match=r"scancel 101: scancel: error: no connection"):
        job.cancel()


# ---------------------------------------------------------------- settings of users


def test_variables_of_sbatch_do_not_override_the_cluster_file(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(site, "sbatch", f"env >{site.root}/seen; echo 5")
    for name in ("PARTITION", "TIMELIMIT", "ACCOUNT", "SIGNAL", "NO_REQUEUE", "EXPORT"):
        monkeypatch.setenv(f"SBATCH_{name}", "mine")
    submit("train", "recipe.yaml", site.cluster(partition="gpu", time_minutes=60))
    seen = [line for line in (site.root / "seen").read_text().splitlines() if "SBATCH_" in line]
    assert seen == ["SBATCH_ACCOUNT=mine"]  # which the file leaves open


def test_the_package_of_another_name_in_the_working_folder_is_not_run(site: Site, job: Job) -> None:
    text = job.folder.script("train").read_text()
    assert " -P -m fastvideo train " in text


def test_a_setup_file_is_found_where_the_job_was_submitted(site: Site) -> None:
    (site.root / "my setup.sh").write_text("module load cuda\n")
    job = submit("train", "recipe.yaml", site.cluster(setup="my setup.sh"))
    text = job.folder.script("train").read_text()
    assert f"source '{site.root}/my setup.sh' || exit\n" in text


def test_a_setup_file_that_is_not_there_is_an_error(site: Site) -> None:
    with pytest.raises(UserError, match=r"setup=none\.sh: there is no such file"):
        submit("train", "recipe.yaml", site.cluster(setup="none.sh"))


@pytest.mark.parametrize("name", ["clusters", "wait", "sig", "arr", "export"])
def test_options_that_would_break_a_job_are_refused(site: Site, name: str) -> None:
    with pytest.raises(UserError, match="follows from other keys"):
        submit("train", "recipe.yaml", site.cluster(options={name: "x"}))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"gpu_type": "a100"}, "#SBATCH --gpus-per-node=a100:4"),
        ({"gpu_type": "a100", "gpu_option": "gres"}, "#SBATCH --gres=gpu:a100:4"),
    ],
)
def test_gpus_of_a_type_can_be_asked_for(site: Site, keys: dict[str, Any], line: str) -> None:
    text = dry_run("train", "recipe.yaml", site.cluster(gpus_per_node=4, **keys))
    assert line in text.splitlines()


# ---------------------------------------------------------------- containers and links


def test_what_a_link_leads_to_is_mounted(site: Site) -> None:
    disk = site.root.with_name(f"{site.root.name}-disk")
    (disk / "run").mkdir(parents=True)
    (site.root / "place").mkdir()
    (site.root / "place/run").symlink_to(disk / "run")
    container = {"kind": "pyxis", "image": "team/image"}
    cluster = site.cluster(container=container, work_dir=str(site.root / "place"))
    changes = [f"run_dir={site.root}/place/run"]
    text = dry_run("train", "recipe.yaml", cluster, overrides=changes)
    mounts = text.partition("--container-mounts=")[2].split()[0].split(",")
    assert f"{disk}/run:{disk}/run" in mounts
    assert f"{site.root}:{site.root}" in mounts  # with the place in it
    assert "--container-image=team/image" in text


@pytest.mark.parametrize("image", ["images/fastvideo.sqsh", "./fastvideo", "fastvideo.sif"])
def test_an_image_that_is_a_file_is_named_by_its_whole_path(site: Site, image: str) -> None:
    cluster = site.cluster(container={"kind": "pyxis", "image": image})
    text = dry_run("train", "recipe.yaml", cluster)
    assert f"--container-image={(site.root / image).resolve()} " in text


def test_a_dry_run_makes_no_folders_for_a_container(site: Site) -> None:
    cluster = site.cluster(container={"kind": "apptainer", "image": "x.sif"})
    before = sorted(site.root.glob("*"))
    dry_run("run", "recipe.yaml", cluster)
    assert sorted(site.root.glob("*")) == before


def test_a_submission_with_a_container_makes_what_is_mounted(site: Site) -> None:
    cluster = site.cluster(container={"kind": "apptainer", "image": "x.sif"})
    job = submit("train", "recipe.yaml", cluster)
    assert (site.root / "shards").is_dir()
    record = Record.read(job.folder)
    assert record is not None and json.loads(job.folder.record.read_text())["verb"] == "train"


def test_nothing_is_lost_while_accounting_is_out_of_order(site: Site, job: Job) -> None:
    made_earlier(job)
    site.tools.queue("")
    site.tools.control(error="slurm_load_jobs error: Invalid job id specified")
    site.tools.accounting(error="sacct: error: Problem talking to the database: Connection refused")
    assert first(job) == State.UNKNOWN
