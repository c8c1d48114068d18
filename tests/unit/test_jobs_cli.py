# SPDX-License-Identifier: Apache-2.0
"""Tests of what the command line shows of jobs, waits for and cancels."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastvideo.launch.folder import JobFolder
from fastvideo.status import CLEAR
from tests.submitting import Site, say

PATIENCE_S = 60.0


def submitted(site: Site, verb: str = "export", *options: str) -> JobFolder:
    done = site.cli(verb, "--cluster", site.cluster(preprocess={"tasks": 2}), *options)
    assert done.code == 0, done.err
    return JobFolder(Path(done.out.strip()))


def runs(site: Site, *jobs: int) -> None:
    """Slurm says that jobs run."""
    site.accounting(*((job, None, "RUNNING") for job in jobs))
    site.tools.queue("\n".join(f"{job}|RUNNING|0|0|n1|0:05|None" for job in jobs))


def ended(site: Site, *rows: tuple[int, int | None, str], code: int = 0) -> None:
    site.accounting(*rows, code=code)  # first, lest somebody who watches finds it nowhere
    site.tools.queue(error="slurm_load_jobs error: Invalid job id specified")


@contextmanager
def started(*arguments: str, terminal: int | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A ``fastvideo`` of its own, killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "fastvideo", *arguments],
        stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


# ---------------------------------------------------------------- submitting


def test_submitting_prints_the_folder_and_says_the_ids(site: Site) -> None:
    done = site.cli("run", "--cluster", site.cluster())
    assert done.code == 0
    (folder,) = site.jobs()
    assert done.out == f"{folder}\n"
    assert re.findall(r"submitted (\S+) (\d+)", done.err) == [
        ("manifest", "101"),
        ("preprocess", "102"),
        ("train", "103"),
        ("export", "104"),
        ("generate", "105"),
    ]


def test_options_of_the_verb_reach_the_job_and_the_command_that_goes_on(site: Site) -> None:
    cluster = site.cluster()
    arguments = ("train.steps=9", "--dtype", "float32", "--cluster", cluster, "--force", "--json")
    done = site.cli("train", *arguments)
    assert done.code == 0, done.err
    assert json.loads(done.out)["verb"] == "train"
    (folder,) = site.jobs()
    assert "recipe.yaml --force ||" in (folder / "train.sbatch").read_text()
    recipe = site.world.recipe
    command = json.loads((folder / "job.json").read_text())["command"]
    wanted = f"fastvideo train {recipe} train.steps=9 --dtype float32 --cluster {cluster}"
    assert " ".join(command) == wanted


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("train", ("--dry-run",), "--cluster"),
        ("train", ("--wait",), "--cluster"),
        ("status", ("--cluster", "x.yaml"), "--cluster belongs to"),
        ("train", ("--cluster", "absent.yaml"), "absent.yaml"),
        ("cancel", ("--job", "20200101-000000-train-0000"), "there are: none"),
    ],
)
def test_mistakes_are_named(site: Site, verb: str, arguments: tuple[str, ...], says: str) -> None:
    done = site.cli(verb, *arguments)
    assert done.code == 2 and says in done.err, done.err
    assert not site.jobs()


# ---------------------------------------------------------------- status


def test_status_shows_parts_reasons_and_how_to_go_on(site: Site) -> None:
    folder = submitted(site, "run")
    say(folder.part("preprocess"), task=1, code=1, message="no space left on device")
    rows = [
        (102, 0, "COMPLETED"),
        (102, 1, "FAILED"),
        *((n, None, "CANCELLED") for n in (103, 104)),
    ]
    ended(site, (101, None, "COMPLETED"), *rows, (105, None, "CANCELLED"), code=1)
    done = site.cli("status")
    lines = done.out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("job "))
    assert re.fullmatch(
        rf"job     {folder.name}  FAILED  \(slurm, \d\d-\d\d \d\d:\d\d\)", lines[at]
    )
    shown = [line.split()[:3] for line in lines[at + 1 : at + 6]]
    assert shown == [
        ["manifest", "101", "COMPLETED"],
        ["preprocess", "102", "FAILED"],
        ["train", "103", "CANCELLED"],
        ["export", "104", "CANCELLED"],
        ["generate", "105", "CANCELLED"],
    ]
    assert lines[at + 1].endswith("0:01:01") and lines[at + 2].endswith("1 COMPLETED, 1 FAILED")
    assert "        preprocess task 1: FAILED: no space left on device" in lines
    assert f"        logs: {folder.root}" in lines
    cluster = site.root / "cluster.yaml"
    again = f"        to go on: fastvideo run {site.world.recipe} --cluster {cluster}"
    assert lines[-1] == again


def test_status_says_why_it_knows_nothing(site: Site) -> None:
    submitted(site)
    site.tools.accounting(error="sacct: error: slurmdbd is down")
    site.tools.queue(error="slurm_load_jobs error: Unable to contact slurm controller")
    site.tools.control(error="slurm_load_jobs error: Unable to contact slurm controller")
    (line,) = (line for line in site.cli("status").out.splitlines() if " export " in line)
    assert "UNKNOWN" in line and "Unable to contact slurm controller" in line


def test_status_as_json_has_the_jobs(site: Site) -> None:
    folder = submitted(site)
    ended(site, (101, None, "CANCELLED by 1000"))
    found = json.loads(site.cli("status", "--json").out)
    (job,) = found["jobs"]
    assert job["job"] == folder.name and job["state"] == "CANCELLED" and job["verb"] == "export"
    part = job["parts"]["export"]
    assert (part["state"], part["id"], part["tasks"]) == ("CANCELLED", "101", {"CANCELLED": 1})
    assert "CANCELLED by 1000" in part["why"]["0"]


def test_watching_through_a_pipe_prints_what_changes_until_the_end(site: Site) -> None:
    submitted(site)
    runs(site, 101)
    with started("status", str(site.world.recipe), "--watch") as process:
        assert process.stdout is not None
        lines: list[str] = []
        while "RUNNING" not in (lines[-1:] or [""])[0]:
            lines.append(process.stdout.readline())
        calls = len(site.tools.calls("sacct"))
        until(lambda: len(site.tools.calls("sacct")) > calls + 1)
        ended(site, (101, None, "COMPLETED"))
        rest, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    text = "".join(lines) + rest
    assert CLEAR not in text and text.count("job     ") == 2
    assert rest.rstrip().endswith("0:01:01") and "COMPLETED" in rest


def test_watching_as_json_prints_an_object_a_line(site: Site) -> None:
    submitted(site)
    ended(site, (101, None, "FAILED"), code=1)
    done = site.cli("status", "--watch", "--json")
    (line,) = done.out.splitlines()
    assert done.code == 0 and json.loads(line)["jobs"][0]["state"] == "FAILED"


def test_watching_on_a_terminal_draws_anew_until_ctrl_c(site: Site) -> None:
    submitted(site)
    runs(site, 101)
    ours, theirs = pty.openpty()
    with started("status", str(site.world.recipe), "--watch", terminal=theirs) as process:
        os.close(theirs)
        text = ""
        while text.count(CLEAR) < 2:
            assert select.select([ours], [], [], PATIENCE_S)[0]
            text += os.read(ours, 4096).decode()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "RUNNING" in text and "Ctrl-C ends only this" in text
    assert site.stand_ins.asked("scancel") == []


def test_watching_where_there_are_no_jobs_ends_at_once(site: Site) -> None:
    done = site.cli("status", "--watch")
    assert done.code == 0 and "0 total" in done.out


# ---------------------------------------------------------------- cancel


def test_cancel_ends_what_is_under_way_and_nothing_else(site: Site) -> None:
    folders = [submitted(site, "train", "--force") for _ in range(3)]
    site.accounting((101, None, "COMPLETED"), (102, None, "RUNNING"), (103, None, "RUNNING"))
    site.tools.queue("102|RUNNING|0|0|n1|0:05|None\n103|RUNNING|0|0|n1|0:05|None")
    done = site.cli("cancel", "--job", folders[1].name, "--json")
    assert done.code == 0 and json.loads(done.out) == [folders[1].name]
    assert site.stand_ins.asked("scancel") == ["102"]
    wrong = site.cli("cancel", "--job", folders[0].name)
    assert wrong.code == 2
    assert folders[1].name in wrong.err and folders[2].name in wrong.err
    assert site.cli("cancel").code == 0
    first, *others = site.stand_ins.asked("scancel")
    assert first == "102" and sorted(others) == ["102", "103"]
    ended(site, *((number, None, "CANCELLED by 1000") for number in (101, 102, 103)))
    done = site.cli("cancel")
    assert done.code == 0 and "nothing is under way" in done.err


def test_cancel_ends_all_parts(site: Site) -> None:
    submitted(site, "run")
    runs(site, 101)
    assert site.cli("cancel").code == 0
    assert site.stand_ins.asked("scancel") == ["101 102 103 104 105"]


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    ("state", "word", "code"),
    [("COMPLETED", None, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("OUT_OF_MEMORY", None, 1)],
)
def test_waiting_ends_as_the_job_does(site: Site, state: str, word: int | None, code: int) -> None:
    ended(site, (101, None, state), code=word or 0)
    if word is not None:
        # What the job will say, from the first moment on.
        script = site.root / "bin/sbatch"
        text = json.dumps(
            {
                "verb": "export",
                "code": word,
                "message": "steps: too few",
                "result": None,
                "progress": None,
                "requeue": False,
                "host": "n1",
                "time": 1.0,
            }
        )
        script.write_text(
            "#!/bin/bash\n"
            'folder=$(dirname "$2")/export/ended; mkdir -p "$folder"\n'
            f"echo '{text}' >\"$folder/0.0.0.json\"\necho 101\n"
        )
    done = site.cli("export", "--cluster", site.cluster(), "--wait")
    (folder,) = site.jobs()
    assert done.code == code, done.err
    assert done.out == f"{folder}\n"
    if code:
        assert f"export: {state}" in done.err and "to go on: fastvideo export" in done.err
        assert word is None or "steps: too few" in done.err


def test_leaving_while_waiting_leaves_the_job_alone(site: Site) -> None:
    runs(site, 101)
    arguments = ["--cluster", str(site.cluster()), "--wait"]
    with started("export", str(site.world.recipe), *arguments) as process:
        assert process.stderr is not None
        said = ""
        while "RUNNING" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert site.stand_ins.asked("scancel") == []
    assert "Ctrl-C leaves the job alone" in said


def test_a_local_job_can_be_waited_for(site: Site) -> None:
    cluster = site.root / "local.yaml"
    cluster.write_text("executor: local\n")
    done = site.cli("export", "--cluster", cluster, "--wait")
    assert done.code == 2, done.err
    assert "export: FAILED: " in done.err and "no model" in done.err, done.err
    text = site.cli("status").out
    assert "export" in text and "FAILED" in text and "(local, " in text
