# SPDX-License-Identifier: Apache-2.0
"""What Slurm 22.05 printed, read back; where newer versions print something else, that as well."""

import pytest

from fastvideo.launch.slurm_output import expand, sacct_rows, scontrol_rows, squeue_rows
from fastvideo.launch.states import State, TaskState

SCONTROL = (
    "JobId={id} JobName={name} UserId=me(1001) GroupId=me(1001) MCS_label=N/A Priority=4294901737 "
    "Nice=0 Account=(null) QOS=normal JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
    "Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={code} DerivedExitCode={steps} "
    "RunTime=1-00:00:29 TimeLimit=UNLIMITED TimeMin=N/A ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList={nodes} BatchHost=n2 NumNodes=1 Command=(null) WorkDir=/var/tmp Power="
)


def account(state: str, code: str, steps: str = "0:0", reason: str = "None") -> TaskState:
    (row,) = sacct_rows(f"7|{state}|{code}|{steps}|29|1795943805|n2|{reason}\n")
    assert (row.job, row.tasks, row.submitted_s) == ("7", (None,), 1795943805.0)
    assert (row.state.elapsed_s, row.state.nodes, row.state.source) == (29.0, "n2", "sacct")
    return row.state


def ended(state: TaskState) -> tuple[State, int | None, int | None, str]:
    return state.state, state.exit_code, state.signal, state.reason


@pytest.mark.parametrize(
    ("words", "code", "steps", "expected"),
    [
        ("COMPLETED", "0:0", "0:0", (State.COMPLETED, 0, None, "")),
        ("COMPLETED", "0:0", "0:15", (State.COMPLETED, 0, None, "")),
        ("FAILED", "3:0", "0:0", (State.FAILED, 3, None, "")),
        ("FAILED", "75:0", "75:0", (State.FAILED, 75, None, "")),
        ("FAILED", "0:9", "0:0", (State.FAILED, None, 9, "")),
        # A step was killed: srun returned 137, from which 22.05 takes 128.
        ("FAILED", "9:0", "0:9", (State.FAILED, 137, 9, "")),
        ("FAILED", "137:0", "0:9", (State.FAILED, 137, 9, "")),
        ("CANCELLED by 1001", "0:0", "0:0", (State.CANCELLED, None, None, "CANCELLED by 1001")),
        ("CANCELLED by 1001", "0:15", "0:15", (State.CANCELLED, None, 15, "CANCELLED by 1001")),
        ("TIMEOUT", "0:0", "0:0", (State.TIMEOUT, None, None, "")),
        ("NODE_FAIL", "0:0", "0:126", (State.NODE_FAIL, None, None, "")),
        # The script itself was out of memory, and a step of a script that goes on.
        ("OUT_OF_MEMORY", "0:125", "0:0", (State.OUT_OF_MEMORY, None, None, "")),
        ("FAILED", "1:0", "0:125", (State.OUT_OF_MEMORY, 1, None, "")),
        ("RUNNING", "0:0", "0:0", (State.RUNNING, None, None, "")),
        ("WHAT_NEW_VERSIONS_SAY", "0:0", "0:0", (State.UNKNOWN, None, None, "")),
    ],
)
def test_sacct_tells_how_a_job_ended(
    words: str, code: str, steps: str, expected: tuple[State, int | None, int | None, str]
) -> None:
    assert ended(account(words, code, steps)) == expected


def test_sacct_keeps_the_reason_to_wait_which_is_told_only_while_it_waits() -> None:
    assert account("PENDING", "0:0", reason="Dependency").reason == "Dependency"
    assert account("RUNNING", "0:0", reason="JobArrayTaskLimit").reason == ""
    assert account("COMPLETED", "0:0", reason="Priority").reason == ""
    never = account("CANCELLED", "0:0", reason="Dependency")
    assert never.reason == "DependencyNeverSatisfied"


def test_sacct_tells_of_tasks_steps_and_parts() -> None:
    text = """\
7_0|CANCELLED by 33|0:0|0:0|2|1795943743|n1|None
7_0.batch|CANCELLED|0:15||2|1795943743|n1|
7_[4-7,9,14-15%2]|PENDING|0:0|0:0|0|1795943743|None assigned|JobArrayTaskLimit
8+0|RUNNING|0:0|0:0|1|1795943801|n1|None
8+1|FAILED|1:0|0:0|1|1795943801|n2|None
8+0.batch|RUNNING|0:0||1|1795943802|n1|
slurm_load: some warning
"""
    rows = list(sacct_rows(text))
    assert [(row.job, row.tasks) for row in rows] == [
        ("7", (0,)),
        ("7", (4, 5, 6, 7, 9, 14, 15)),
        ("8", (None,)),
    ]
    assert [row.waits for row in rows] == [False, True, False]
    assert rows[1].state == TaskState(
        State.PENDING, "JobArrayTaskLimit", elapsed_s=0.0, source="sacct"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("COMPLETED|0|0|n1|0:03|None", (State.COMPLETED, 0, None, "")),
        ("FAILED|768|0|n1|0:00|NonZeroExitCode", (State.FAILED, 3, None, "NonZeroExitCode")),
        ("FAILED|3:0|0|n1|0:00|NonZeroExitCode", (State.FAILED, 3, None, "NonZeroExitCode")),
        ("FAILED|35072|0|n1|0:00|NonZeroExitCode", (State.FAILED, 137, 9, "NonZeroExitCode")),
        ("FAILED|9|0|n1|0:00|JobLaunchFailure", (State.FAILED, None, 9, "JobLaunchFailure")),
        ("TIMEOUT|9|0|n1|1:27|TimeLimit", (State.TIMEOUT, None, 9, "TimeLimit")),
        (
            "OUT_OF_MEMORY|253|0|n1|0:27|OutOfMemory",
            (State.OUT_OF_MEMORY, None, None, "OutOfMemory"),
        ),
        ("NODE_FAIL|0|0|n3|0:29|NodeDown", (State.NODE_FAIL, None, None, "NodeDown")),
        ("CANCELLED|0|0||0:00|JobArrayTaskLimit", (State.CANCELLED, None, None, "")),
        (
            "CANCELLED|0|0||0:00|DependencyNeverSatisfied",
            (State.CANCELLED, None, None, "DependencyNeverSatisfied"),
        ),
        # 256 is how its earlier start ended.
        ("PENDING|256|1||0:00|BeginTime", (State.PENDING, None, None, "BeginTime")),
    ],
)
def test_squeue_tells_how_a_job_ended(
    line: str, expected: tuple[State, int | None, int | None, str]
) -> None:
    (row,) = squeue_rows(f"7|{line}\n")
    assert ended(row.state) == expected


def test_squeue_tells_of_restarts_times_and_odd_reasons() -> None:
    text = """\
7_1|PENDING|0|3||0:00|ReqNodeNotAvail, UnavailableNodes:n2
7_0|RUNNING|0|0|n[1-4]|2-01:00:05|None
8|RUNNING|0|0|n1|INVALID|a|b
"""
    first, second, third = squeue_rows(text)
    assert (first.tasks, first.state.restarts) == ((1,), 3)
    assert first.state.reason == "ReqNodeNotAvail, UnavailableNodes:n2"
    assert (second.tasks, second.state.elapsed_s) == ((0,), 49 * 3600 + 5.0)
    assert (second.state.nodes, second.state.reason) == ("n[1-4]", "")
    assert (third.state.elapsed_s, third.state.reason) == (None, "a|b")


def test_scontrol_tells_of_jobs_tasks_and_parts() -> None:
    line = SCONTROL.format(
        id="{}", name="a b", state="NODE_FAIL", reason="NodeDown", restarts=2, code="0:0",
        steps="0:126", nodes="n2",
    )  # fmt: skip
    heads = (
        "7",
        "9 ArrayJobId=8 ArrayTaskId=1",
        "8 ArrayJobId=8 ArrayTaskId=2-7,9%2 ArrayTaskThrottle=2",
        "11 HetJobId=11 HetJobOffset=0",
        "12 HetJobId=11 HetJobOffset=1",
    )
    rows = list(scontrol_rows("\n".join(line.format(head) for head in heads)))
    assert [(row.job, row.tasks) for row in rows] == [
        ("7", (None,)),
        ("8", (1,)),
        ("8", (2, 3, 4, 5, 6, 7, 9)),
        ("11", (None,)),
    ]
    assert rows[0].state == TaskState(
        State.NODE_FAIL,
        "NodeDown",
        nodes="n2",
        restarts=2,
        elapsed_s=86429.0,
        source="scontrol",
    )


def test_scontrol_finds_a_step_that_was_out_of_memory() -> None:
    line = SCONTROL.format(
        id=7, name="x", state="FAILED", reason="NonZeroExitCode", restarts=0, code="1:0",
        steps="0:125", nodes="n2",
    )  # fmt: skip
    (row,) = scontrol_rows(line)
    assert ended(row.state) == (State.OUT_OF_MEMORY, 1, None, "NonZeroExitCode")


def test_a_name_that_looks_like_a_state_makes_the_state_unknown() -> None:
    line = SCONTROL.format(
        id=7, name="x JobState=COMPLETED Reason=None", state="RUNNING", reason="None", restarts=0,
        code="0:0", steps="0:0", nodes="n2",
    )  # fmt: skip
    (row,) = scontrol_rows(line)
    assert (row.job, row.state.state, row.state.nodes) == ("7", State.UNKNOWN, "n2")


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("4", (4,)),
        ("4-7,9%2", (4, 5, 6, 7, 9)),
        ("3-11:4%1", (3, 7, 11)),
        ("0-2,10,...", (0, 1, 2, 10)),
        ("", ()),
    ],
)
def test_tasks_are_expanded(text: str, tasks: tuple[int, ...]) -> None:
    assert expand(text) == tasks


def test_a_list_that_was_cut_off_has_no_closing_bracket() -> None:
    (row,) = sacct_rows("7_[1,3,5,...|PENDING|0:0|0:0|0|1795943743|None assigned|None\n")
    assert row.tasks == (1, 3, 5)
