# SPDX-License-Identifier: Apache-2.0
"""Tests of jobs of this machine: real controllers, real processes, small programs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fastvideo import atomic
from fastvideo.errors import UserError
from fastvideo.launch.controller import judge
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.local import LocalPart, Tasks, cancel, gpu_pool, read_local, start
from fastvideo.launch.process import Process

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0
RECORD = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd()}))
"""
MEET = """
import pathlib, sys, time
mine, others = pathlib.Path(sys.argv[1]), [pathlib.Path(name) for name in sys.argv[2:]]
mine.touch()
deadline_s = time.monotonic() + 30
while not all(other.exists() for other in others):
    assert time.monotonic() < deadline_s, "alone"
    time.sleep(0.02)
"""
SAVES_ON_TERM = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
DEAF_TO_TERM = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
HOSTILE = (
    "a b",
    "'\"`$(touch injected)`;|&<>\\",
    "line\nbreak\ttab\r",
    "$HOME ${PATH} %u *?[x]{a,b}~!#",
    "-–ü漢🎬",
    "",
    "\udcff",  # what Python makes of a byte that is no UTF-8
)


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    root = tmp_path / "jobs" / "20261129-093000-train-1f3a"
    root.mkdir(parents=True, mode=0o700)
    return JobFolder(root)


def test_a_task_gets_its_arguments_variables_and_folder_unchanged(tmp_path: Path) -> None:
    names = [name for name in HOSTILE if name]
    work_dir = tmp_path.joinpath(*names)
    folder = JobFolder(tmp_path.joinpath("job", *names))
    for path in (work_dir, folder.root):
        path.mkdir(parents=True)
    environment = {f"V{number}": value for number, value in enumerate(HOSTILE)}
    part = LocalPart("train", {0: python(RECORD, *HOSTILE)}, environment, work_dir)
    start(folder, parts=[part], gpus=[])
    assert states(finished(folder)) == {"train": ["COMPLETED"]}
    seen = json.loads(folder.part("train").log(None).read_bytes())
    assert seen["argv"][1:] == list(HOSTILE)
    assert environment.items() <= seen["env"].items()
    assert seen["cwd"] == str(work_dir)
    assert seen["env"]["FASTVIDEO_JOB_DIR"] == str(folder.part("train").root)
    assert [seen["env"][f"FASTVIDEO_{name}"] for name in ("TASK", "RESTART")] == ["0", "0"]
    assert not list(tmp_path.rglob("injected"))


def test_a_task_is_no_node_of_the_job_it_was_submitted_from(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_NODES", "4")
    monkeypatch.setenv("FASTVIDEO_NODE_RANK", "$SLURM_PROCID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    start(folder, parts=[one("train", *python(RECORD))], gpus=[])
    finished(folder)
    seen = json.loads(folder.part("train").log(None).read_bytes())["env"]
    assert "FASTVIDEO_NODES" not in seen
    assert "FASTVIDEO_NODE_RANK" not in seen
    assert seen["CUDA_VISIBLE_DEVICES"] == ""


def test_states_are_there_before_anything_runs_and_logs_are_appended(folder: JobFolder) -> None:
    folder.part("train").root.mkdir()
    folder.part("train").log(None).write_text("before\n")
    start(folder, parts=[one("train", "sh", "-c", "echo out; echo err >&2")], gpus=[])
    assert states(read_local(folder)).keys() == {"train"}
    finished(folder)
    assert folder.part("train").log(None).read_text() == "before\nout\nerr\n"


def test_no_more_tasks_run_at_once_than_the_array_allows(folder: JobFolder, tmp_path: Path) -> None:
    part = noting(tmp_path, tasks=7, parallelism=2)
    start(folder, parts=[part], gpus=[])
    assert Counter(states(finished(folder))["preprocess"]) == {"COMPLETED": 7}
    assert 1 <= most_at_once(tmp_path) <= 2


def test_tasks_of_an_array_without_gpus_run_one_by_one_by_default(
    folder: JobFolder, tmp_path: Path
) -> None:
    start(folder, parts=[noting(tmp_path, tasks=3, parallelism=None)], gpus=[])
    finished(folder)
    assert most_at_once(tmp_path) == 1
    assert folder.part("preprocess").log(2).exists()


def test_tasks_run_at_the_same_time_up_to_the_parallelism(
    folder: JobFolder, tmp_path: Path
) -> None:
    part = array("preprocess", {3: meeting(tmp_path, "a", "b"), 9: meeting(tmp_path, "b", "a")})
    start(folder, parts=[changed(part, parallelism=2)], gpus=[])
    assert states(finished(folder)) == {"preprocess": ["COMPLETED", "COMPLETED"]}


def test_parts_that_do_not_need_each_other_run_side_by_side(
    folder: JobFolder, tmp_path: Path
) -> None:
    high = one("train-high", *meeting(tmp_path, "high", "low"))
    low = one("train-low", *meeting(tmp_path, "low", "high"))
    gpus = [changed(part, gpus=1) for part in (high, low)]
    start(folder, parts=gpus, gpus=["0", "1"])
    tasks = finished(folder)
    assert states(tasks) == {"train-high": ["COMPLETED"], "train-low": ["COMPLETED"]}
    assert {tasks[name][0].gpus for name in tasks} == {("0",), ("1",)}


def test_gpus_are_dealt_out_and_no_two_tasks_hold_the_same(
    folder: JobFolder, tmp_path: Path
) -> None:
    part = changed(noting(tmp_path, tasks=6, parallelism=None), gpus=2)
    pool = ["0", "3", "GPU-5f", "7", "9"]
    start(folder, parts=[part], gpus=pool)
    assert Counter(states(finished(folder))["preprocess"]) == {"COMPLETED": 6}
    held: set[str] = set()
    used: set[str] = set()
    for what, gpus in events(tmp_path):
        own = set(gpus.split(","))
        assert len(own) == 2
        assert own.isdisjoint(held) if what == "start" else own <= held
        held = held | own if what == "start" else held - own
        used |= own
    assert used <= set(pool)
    assert most_at_once(tmp_path) <= 2


def test_a_part_starts_after_all_tasks_of_those_it_needs(folder: JobFolder, tmp_path: Path) -> None:
    first = noting(tmp_path, tasks=3, parallelism=3)
    then = one("train", "sh", "-c", f"cp '{tmp_path}/events' '{tmp_path}/seen'")
    start(folder, parts=[first, changed(then, after=("preprocess",))], gpus=[])
    assert states(finished(folder))["train"] == ["COMPLETED"]
    assert Counter(line.split()[0] for line in (tmp_path / "seen").read_text().splitlines()) == {
        "start": 3,
        "end": 3,
    }


def test_what_depends_on_a_failed_part_is_cancelled_down_the_chain(folder: JobFolder) -> None:
    parts = [
        array("preprocess", {0: ("true",), 1: ("sh", "-c", "exit 2"), 2: ("true",)}),
        one("train", "true", after=("preprocess",)),
        one("export", "true", after=("train",)),
        one("other", "true"),
    ]
    start(folder, parts=parts, gpus=[])
    tasks = finished(folder)
    assert states(tasks) == {
        "preprocess": ["COMPLETED", "FAILED", "COMPLETED"],
        "train": ["CANCELLED"],
        "export": ["CANCELLED"],
        "other": ["COMPLETED"],
    }
    assert tasks["preprocess"][1].exit_code == 2
    assert tasks["train"][0].reason == "needs preprocess"
    assert tasks["export"][0].reason == "needs train"


def test_a_killed_task_is_failed_with_its_signal(folder: JobFolder) -> None:
    start(folder, parts=[one("train", *sleeper()), one("other", "true")], gpus=[])
    os.kill(pid_of(folder, "train"), signal.SIGKILL)
    tasks = finished(folder)
    assert states(tasks) == {"train": ["FAILED"], "other": ["COMPLETED"]}
    task = tasks["train"][0]
    assert (task.exit_code, task.signal) == (None, signal.SIGKILL)
    assert "SIGKILL" in task.reason
    assert task.started is not None and task.ended is not None and task.started <= task.ended


def test_what_a_task_leaves_running_ends_with_it(folder: JobFolder) -> None:
    start(folder, parts=[one("train", "sh", "-c", "sleep 300 & echo $!")], gpus=[])
    finished(folder)
    left = int(folder.part("train").log(None).read_text())
    eventually(lambda: not atomic.running(left))


def test_a_program_that_is_not_there_fails_by_name_and_the_rest_goes_on(folder: JobFolder) -> None:
    lost = changed(one("b", "true"), work_dir=folder.root / "no such folder")
    parts = [one("a", "no-such-program"), lost, one("c", "true")]
    start(folder, parts=parts, gpus=[])
    tasks = finished(folder)
    assert states(tasks) == {"a": ["FAILED"], "b": ["FAILED"], "c": ["COMPLETED"]}
    assert "no-such-program" in tasks["a"][0].reason
    assert "no such folder" in tasks["b"][0].reason


def test_a_task_that_stopped_with_all_saved_asks_to_be_submitted_again(folder: JobFolder) -> None:
    start(folder, parts=[one("train", "sh", "-c", "exit 75")], gpus=[])
    (task,) = finished(folder)["train"].values()
    assert (task.state, task.exit_code) == ("FAILED", 75)
    assert task.reason == "stopped, state saved; submit again"


def test_cancelled_tasks_may_save_their_state(folder: JobFolder) -> None:
    parts = [
        one("train", "sh", "-c", SAVES_ON_TERM),
        one("export", "true", after=("train",)),
    ]
    start(folder, parts=parts, gpus=[])
    ready(folder, "train")
    tasks = cancel(folder)
    assert states(tasks) == {"train": ["CANCELLED"], "export": ["CANCELLED"]}
    assert tasks["train"][0].exit_code == 75
    assert "state saved" in tasks["train"][0].reason
    assert folder.part("train").log(None).read_text().endswith("saved\n")


def test_a_cancelled_part_leaves_the_others_alone(folder: JobFolder, tmp_path: Path) -> None:
    parts = [
        one("train-high", "sh", "-c", SAVES_ON_TERM),
        one("train-low", *meeting(tmp_path, "low", "go on")),
        one("export", "true", after=("train-high", "train-low")),
    ]
    start(folder, parts=parts, gpus=[])
    ready(folder, "train-high")
    assert cancel(folder, parts=["train-high"])["train-low"][0].state == "RUNNING"
    (tmp_path / "go on").touch()
    tasks = finished(folder)
    assert states(tasks) == {
        "train-high": ["CANCELLED"],
        "train-low": ["COMPLETED"],
        "export": ["CANCELLED"],
    }
    assert tasks["export"][0].reason == "needs train-high"


def test_a_cancelled_task_that_does_not_stop_is_killed(folder: JobFolder) -> None:
    start(folder, parts=[one("train", "sh", "-c", DEAF_TO_TERM)], gpus=[], grace_s=0.3)
    ready(folder, "train")
    (task,) = cancel(folder)["train"].values()
    assert (task.state, task.signal) == ("CANCELLED", signal.SIGKILL)
    assert task.reason == "killed, as it did not stop in time"


def test_cancel_returns_in_time_where_a_task_is_slow_to_stop(folder: JobFolder) -> None:
    pid = start(folder, parts=[one("train", "sh", "-c", DEAF_TO_TERM)], gpus=[])
    ready(folder, "train")
    assert states(cancel(folder, timeout_s=1.0)) == {"train": ["RUNNING"]}
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_controller_cancels_the_job_however_early(
    folder: JobFolder, number: signal.Signals
) -> None:
    pid = start(folder, parts=[one("train", *sleeper()), one("more", *sleeper())], gpus=[])
    os.kill(pid, number)
    assert states(finished(folder)) == {"train": ["CANCELLED"], "more": ["CANCELLED"]}
    eventually(lambda: not atomic.running(pid))


def test_a_job_whose_controller_was_killed_is_lost_and_its_tasks_are_gone(
    folder: JobFolder,
) -> None:
    parts = [one("done", "true"), one("train", *sleeper(), after=("done",))]
    parts.append(one("export", "true", after=("train",)))
    pid = start(folder, parts=parts, gpus=[])
    task = pid_of(folder, "train")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not atomic.running(task))
    tasks = read_local(folder)
    assert states(tasks) == {"done": ["COMPLETED"], "train": ["LOST"], "export": ["LOST"]}
    assert "controller.txt" in tasks["train"][0].reason
    assert states(cancel(folder)) == states(tasks)


def test_a_job_outlives_the_terminal_it_was_submitted_from(
    folder: JobFolder, tmp_path: Path
) -> None:
    submit = (
        "import sys, time; from pathlib import Path\n"
        "from fastvideo.launch.folder import JobFolder\n"
        "from fastvideo.launch.local import LocalPart, start\n"
        "argv = {0: tuple(sys.argv[2:])}\n"
        "part = LocalPart('train', argv, {}, Path.cwd())\n"
        "start(JobFolder(Path(sys.argv[1])), parts=[part], gpus=[])\n"
        "print('submitted', flush=True)\n"
        "time.sleep(300)\n"
    )
    command = [*python(submit, str(folder.root)), *meeting(tmp_path, "task", "go on")]
    shell = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    assert shell.stdout is not None
    assert shell.stdout.readline() == b"submitted\n"
    eventually((tmp_path / "task").exists)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL):
        os.killpg(shell.pid, number)
    shell.communicate()
    (tmp_path / "go on").touch()
    assert states(finished(folder)) == {"train": ["COMPLETED"]}


def test_another_host_tells_what_it_cannot_know(folder: JobFolder) -> None:
    start(folder, parts=[one("done", "true"), one("train", *sleeper())], gpus=[])
    pid_of(folder, "train")
    eventually(lambda: read_local(folder)["done"][0].is_final)
    controller = atomic.read_json(folder.root / "controller.json")
    elsewhere = {**controller, "host": "elsewhere"}
    atomic.write_json(folder.root / "controller.json", elsewhere, point="test")
    tasks = read_local(folder)
    assert states(tasks) == {"done": ["COMPLETED"], "train": ["RUNNING"]}
    assert tasks["done"][0].reason == ""
    assert "elsewhere" in tasks["train"][0].reason
    assert states(cancel(folder))["train"] == ["CANCELLED"]


def test_a_process_is_not_taken_for_a_later_one_of_its_number(tmp_path: Path) -> None:
    us = Process.of(os.getpid())
    us.write(tmp_path / "us.json")
    assert Process.read(tmp_path / "us.json") == us
    assert us.runs() is True
    assert Process(us.host, us.boot, us.namespace, us.pid, us.started - 1).runs() is False
    assert Process(us.host, "earlier", us.namespace, us.pid, us.started).runs() is False
    assert Process(us.host, us.boot, "pid:[1]", us.pid, us.started).runs() is None
    assert Process("elsewhere", us.boot, us.namespace, us.pid, us.started).runs() is None


def test_a_folder_without_a_plan_is_no_local_job(folder: JobFolder) -> None:
    assert read_local(folder) == {}
    assert cancel(folder) == {}


def test_more_gpus_than_there_are_is_an_error_that_says_how_many(folder: JobFolder) -> None:
    part = changed(one("train", "true"), gpus=4)
    with pytest.raises(UserError, match="train: gpus_per_node=4, but GPUs to be had here are 0,1"):
        start(folder, parts=[part], gpus=["0", "1"])
    assert not list(folder.root.iterdir())


def test_a_zero_character_is_an_error(folder: JobFolder) -> None:
    with pytest.raises(UserError, match="zero character"):
        start(folder, parts=[one("train", "echo", "a\0b")], gpus=[])


@pytest.mark.parametrize(
    ("visible", "pool"),
    [
        (None, ("0", "1", "2")),
        ("5,1", ("5", "1")),
        ("GPU-a1, MIG-b2,7,8", ("GPU-a1", "MIG-b2", "7")),
        ("2,2", ("2",)),
        ("2,-1,3", ("2",)),
        ("", ()),
    ],
)
def test_the_pool_is_what_the_submitter_sees(visible: str | None, pool: tuple[str, ...]) -> None:
    assert gpu_pool(3, visible=visible) == pool


@pytest.mark.parametrize(
    ("code", "cancelled", "state"),
    [
        (0, True, "COMPLETED"),
        (75, True, "CANCELLED"),
        (-15, True, "CANCELLED"),
        (1, False, "FAILED"),
        (130, False, "FAILED"),
        (-11, False, "FAILED"),
    ],
)
def test_a_state_follows_from_code_and_cancellation(code: int, cancelled: bool, state: str) -> None:
    assert judge(code, cancelled=cancelled)[0] == state


# ---------------------------------------------------------------- parts


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def sleeper() -> tuple[str, ...]:
    return ("sleep", "300")


def meeting(tmp_path: Path, mine: str, *others: str) -> tuple[str, ...]:
    """A program that ends once it and the others have started."""
    return python(MEET, *(str(tmp_path / name) for name in (mine, *others)))


def one(name: str, *argv: str, after: tuple[str, ...] = ()) -> LocalPart:
    return LocalPart(name, {0: argv}, {}, ROOT, after=after)


def array(name: str, argv: Mapping[int, tuple[str, ...]]) -> LocalPart:
    return LocalPart(name, argv, {}, ROOT, is_array=True)


def changed(part: LocalPart, **values: object) -> LocalPart:
    return LocalPart(**{**vars(part), **values})


def noting(tmp_path: Path, *, tasks: int, parallelism: int | None) -> LocalPart:
    """An array whose tasks note when they start and end, and their GPUs."""
    note = f"$CUDA_VISIBLE_DEVICES\" >> '{tmp_path}/events'"
    argv = ("sh", "-c", f'echo "start {note}; sleep 0.1; echo "end {note}')
    return changed(array("preprocess", dict.fromkeys(range(tasks), argv)), parallelism=parallelism)


def events(tmp_path: Path) -> list[tuple[str, str]]:
    lines = (tmp_path / "events").read_text().splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def most_at_once(tmp_path: Path) -> int:
    running = most = 0
    for what, _ in events(tmp_path):
        running += 1 if what == "start" else -1
        most = max(most, running)
    return most


# ---------------------------------------------------------------- waiting


def eventually(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def finished(folder: JobFolder) -> Tasks:
    def over() -> bool:
        return all(task.is_final for part in read_local(folder).values() for task in part.values())

    eventually(over)
    return read_local(folder)


def ready(folder: JobFolder, part: str) -> None:
    log = folder.part(part).log(None)
    eventually(lambda: log.exists() and log.read_text().startswith("ready"))


def pid_of(folder: JobFolder, part: str) -> int:
    eventually(lambda: read_local(folder)[part][0].pid is not None)
    pid = read_local(folder)[part][0].pid
    assert pid is not None
    return pid


def states(tasks: Tasks) -> dict[str, list[str]]:
    return {name: [task.state for task in part.values()] for name, part in tasks.items()}
