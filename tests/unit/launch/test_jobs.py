# SPDX-License-Identifier: Apache-2.0
"""Tests of jobs after they were submitted: what is known of them, from whom, and for how long."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastvideo.errors import Failed, UserError
from fastvideo.launch import Job, submit
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.record import Record
from fastvideo.launch.states import State
from fastvideo.launch.statuses import JobStatus, reasons, recent, statuses, under_way
from fastvideo.launch.table import describe
from fastvideo.launch.watch import Watcher
from tests import submitting
from tests.submitting import Site, say
from tests.tiny_world import start_fork, wait_for

NOBODY = 65534


@pytest.fixture
def job(site: Site) -> Job:
    """A pipeline whose arrays have three tasks: parts 101 to 105, shards 102."""
    return submit("run", "recipe.yaml", site.cluster(preprocess={"tasks": 3}))


def shards(*states: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((102, number, state) for number, state in enumerate(states))


def done(*ids: int) -> tuple[tuple[int, None, str], ...]:
    return tuple((job, None, "COMPLETED") for job in ids)


ALL_DONE = (*done(101), *shards(*["COMPLETED"] * 3), *done(103, 104, 105))


def states(status: JobStatus) -> list[str]:
    return [str(part.state) for part in status.parts.values()]


# ---------------------------------------------------------------- states and reasons


def test_a_job_is_as_its_first_part_that_is_not_done(site: Site, job: Job) -> None:
    site.accounting(*done(101), *shards("COMPLETED", "RUNNING", "PENDING"))
    rows = [f"{job}|PENDING|0|0||0:00|Dependency" for job in (103, 104, 105)]
    rows += ["102_1|RUNNING|0|0|n1|0:05|None", "102_2|PENDING|0|0||0:00|Resources"]
    site.tools.queue("\n".join(rows))
    status = job.status()
    assert states(status) == ["COMPLETED", "RUNNING", "PENDING", "PENDING", "PENDING"]
    assert status.state == State.RUNNING and not status.is_final
    assert status.parts["preprocess"].counts == {"COMPLETED": 1, "RUNNING": 1, "PENDING": 1}
    assert not (job.folder.root / "final.json").exists()


def test_a_failed_part_says_which_tasks_and_why_each_reason_once(site: Site, job: Job) -> None:
    part = job.folder.part("preprocess")
    for task in (0, 2):
        say(part, task=task, verb="preprocess", code=2, message="clips/7.mp4: no video")
    say(part, task=1, code=1, message="of an earlier start")
    site.accounting(
        *done(101),
        *shards("FAILED", "COMPLETED", "FAILED"),
        *((number, None, "CANCELLED by 1000") for number in (103, 104, 105)),
    )
    status = job.status()
    assert status.is_final and status.state == State.FAILED
    told = reasons(status)
    assert told[0] == "preprocess task 0,2: FAILED: clips/7.mp4: no video"
    assert told[1].startswith("train: CANCELLED: ") and len(told) == 4
    with pytest.raises(Failed, match=r"task 0,2: FAILED: clips/7\.mp4"):
        job.result()
    text = describe([status])
    assert "2 FAILED" in text and f"to go on: {' '.join(job.record.command)}" in text


def test_reasons_in_a_table_are_few_and_short(site: Site, job: Job) -> None:
    part = job.folder.part("preprocess")
    for task in range(3):
        say(part, task=task, code=1, message=f"{task} " + "x" * 5000)
    site.accounting(*done(101), *shards(*["FAILED"] * 3))
    text = describe([job.status()])
    assert len(text) < 3000 and text.count("...") == 3


def test_results_and_logs_are_by_part_and_task(site: Site, job: Job) -> None:
    site.accounting(*ALL_DONE)
    for task in range(3):
        say(job.folder.part("preprocess"), task=task, result={"filled": task})
    part = job.folder.part("train")
    say(part, restart=0, code=75, message="stopped", requeue=True)
    say(part, restart=1, node=0, result={"step": 7})
    say(part, restart=1, node=1, result={"step": 0})
    part.log(None).write_text("step 7\n")
    job.folder.part("preprocess").log(1).write_text("one\n")
    found = job.result(timeout_s=30)
    assert found["preprocess"] == {task: {"filled": task} for task in range(3)}
    assert found["train"] == {"step": 7} and found["export"] is None
    logs = job.logs()
    assert logs["train"] == {0: "step 7\n"} and logs["preprocess"] == {1: "one\n"}


def test_words_say_how_a_job_ended_that_slurm_has_forgotten(site: Site, job: Job) -> None:
    say(job.folder.part("manifest"))
    say(job.folder.part("preprocess"), task=1, code=1, message="no space left")
    watcher = Watcher(patience_s=0.0)
    job = Job(job.folder, watcher=watcher)
    status = job.status()
    assert [str(part.state) for part in status.parts.values()][:2] == ["COMPLETED", "FAILED"]
    assert "no space left" in "\n".join(reasons(status))


def test_waiting_has_an_end(site: Site, job: Job) -> None:
    site.tools.queue("101|RUNNING|0|0|n1|0:05|None")
    begin_s = time.monotonic()
    with pytest.raises(TimeoutError, match="after 1 s"):
        job.wait(timeout_s=1)
    assert time.monotonic() - begin_s < 10


# ---------------------------------------------------------------- what is over


def test_how_a_job_ended_is_remembered_when_slurm_is_gone(site: Site, job: Job) -> None:
    site.accounting(*ALL_DONE[:-1], (105, None, "OUT_OF_MEMORY"))
    before = job.status()
    assert (job.folder.root / "final.json").exists()
    calls = len(site.tools.calls("sacct"))
    site.tools.hang("sacct", "squeue", "scontrol")
    after = job.status()
    assert states(after) == states(before) and after.state == State.OUT_OF_MEMORY
    assert reasons(after) == reasons(before)
    assert len(site.tools.calls("sacct")) == calls


def test_many_jobs_ask_slurm_once_and_those_that_are_over_never(site: Site) -> None:
    cluster = site.cluster()
    made = [submit("train", "recipe.yaml", cluster, flags=["--force"]) for _ in range(4)]
    site.accounting(*done(101, 102), (103, None, "RUNNING"), (104, None, "PENDING"))
    site.tools.queue("103|RUNNING|0|0|n1|0:05|None\n104|PENDING|0|0||0:00|Priority")
    calls = len(site.tools.calls("sacct"))
    shown = recent(site.root / "run")
    assert len(site.tools.calls("sacct")) == calls + 1
    # Those that are not over, and the newest that is.
    assert len(shown) == 3 and [str(status.state) for status in shown].count("COMPLETED") == 1
    list(statuses([job.folder for job in made]))
    assert "-j 103,104 " in site.tools.calls("sacct")[-1]
    assert {status.folder for status in under_way(site.root / "run")} == {
        made[2].folder,
        made[3].folder,
    }


# ---------------------------------------------------------------- odd folders


def test_a_job_whose_submission_died_half_way_is_told_so(site: Site, job: Job) -> None:
    record = job.record
    parts = tuple(
        part if part.name in ("manifest", "preprocess") else replace(part, slurm_id=None)
        for part in record.parts
    )
    site.accounting(*done(101), *shards(*["COMPLETED"] * 3))
    replace(record, parts=parts).write(job.folder)
    young = job.status()
    assert young.parts["train"].tasks[0].reason == "being submitted" and not young.is_final
    replace(record, parts=parts, created=record.created - 400).write(job.folder)
    old = job.status()
    assert old.is_final and old.state == State.CANCELLED
    assert "submission was killed" in old.parts["train"].tasks[0].reason


def test_a_local_job_whose_submission_died_is_over_after_a_while(site: Site) -> None:
    cluster = site.root / "local.yaml"
    cluster.write_text("executor: local\ngpus_per_node: 1\n")
    with pytest.raises(UserError):
        submit("train", "recipe.yaml", cluster)  # no GPU is shown
    (folder,) = map(JobFolder, site.jobs())
    record = Record.read(folder)
    assert record is not None
    replace(record, refused="").write(folder)
    assert not Job(folder).status().is_final
    replace(record, refused="", created=record.created - 400).write(folder)
    assert Job(folder).status().state == State.CANCELLED


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("text", ['{"schema": 99, "parts": 7}', "[]", "no json", ""])
def test_folders_that_hold_no_job_of_this_version_are_left_out(
    site: Site, job: Job, text: str
) -> None:
    site.accounting(*ALL_DONE)
    other = job.folder.root.parent / "20991231-000000-train-0000"
    other.mkdir()
    (other / "job.json").write_text(text)
    (other.parent / "20991231-000000-train-0001").mkdir()
    assert [status.folder for status in recent(site.root / "run")] == [job.folder]
    with pytest.raises(UserError, match="holds no job"):
        Job(other)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Files that others can read."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        monkeypatch.chdir(root)
        yield submitting.make(root, monkeypatch)


def as_somebody_else(action: Callable[[], int]) -> int:
    """Run it in a fork as another user; as this one where only root could change."""

    def changed() -> int:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        return action()

    return wait_for(start_fork(changed, environment={}))


def test_the_private_jobs_of_others_are_left_out(public: Site) -> None:
    job = submit("export", "recipe.yaml", public.cluster())
    job.folder.root.chmod(0o000)
    assert as_somebody_else(lambda: len(recent(public.root / "run"))) == 0
    job.folder.root.chmod(0o700)
    assert len(recent(public.root / "run")) == 1


def test_jobs_that_others_show_can_be_looked_at(public: Site) -> None:
    job = submit("export", "recipe.yaml", public.cluster())
    for path in (job.folder.root, *job.folder.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    public.accounting(*done(101))
    for path in (public.root / "bin").iterdir():
        path.chmod(0o777)
    (public.root / "bin").chmod(0o777)

    def look() -> int:
        (status,) = recent(public.root / "run")
        return 7 if status.state == State.COMPLETED else 1

    assert as_somebody_else(look) == 7
    assert not (job.folder.root / "final.json").exists()
    job.folder.root.chmod(0o700)


def test_the_record_reads_back_as_it_was_written(site: Site, job: Job) -> None:
    record = job.record
    record.write(job.folder)
    assert Record.read(job.folder) == record
    assert json.loads(job.folder.record.read_text())["schema"] == 1
