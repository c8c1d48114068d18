# SPDX-License-Identifier: Apache-2.0
"""What the watcher makes of the answers of Slurm's tools, which are real programs here."""

import time
from pathlib import Path

import pytest

from fastvideo.errors import UserError
from fastvideo.launch import watch
from fastvideo.launch.states import State, TaskState
from fastvideo.launch.watch import States, Watcher
from tests.slurm_tools import NO_ACCOUNTING, NO_CONTROLLER, NO_SUCH_JOB, Tools

SCONTROL = (
    "JobId={id} JobName=x UserId=me(1) GroupId=me(1) JobState={state} Reason=None "
    "Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 ExitCode={code} DerivedExitCode={steps} "
    "RunTime=00:00:29 NodeList=n2 BatchHost=n2"
)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path, monkeypatch)


def one(watcher: Watcher, job: str = "7") -> TaskState:
    (state,) = watcher.look([job])[job].values()
    return state


def names(states: States, job: str = "7") -> dict[int | None, str]:
    return {task: str(state.state) for task, state in states[job].items()}


def test_sacct_is_believed_where_it_says_that_all_ended(tools: Tools) -> None:
    tools.accounting(
        """7|FAILED|3:0|0:0|0|1795943738|n1|None
        8|CANCELLED by 33|0:0|0:0|2|1795943743|n1|None"""
    )
    states = Watcher().look(["7", "8"])
    assert names(states) == {None: "FAILED"}
    assert states["8"][None].reason == "CANCELLED by 33"
    assert all(state.is_final for of_job in states.values() for state in of_job.values())
    assert len(tools.calls("sacct")) == 1
    assert "7,8" in tools.calls("sacct")[0]
    assert tools.calls("squeue") == []


def test_what_sacct_does_not_know_yet_is_asked_of_squeue(tools: Tools) -> None:
    tools.queue("7|PENDING|0|0||0:00|Resources")
    state = one(Watcher())
    assert (state.state, state.reason, state.source) == (State.PENDING, "Resources", "squeue")
    assert not state.is_final
    assert tools.calls("scontrol") == []


def test_filters_of_the_user_reach_no_tool(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "main")
    monkeypatch.setenv("SACCT_FORMAT", "JobName")
    monkeypatch.setenv("SLURM_CONF", "somewhere")
    Watcher().look(["7"])
    for name in ("sacct", "squeue", "scontrol"):
        environment = tools.environment(name)
        assert not [line for line in environment if line.startswith(("SQUEUE_", "SACCT_"))]
        assert {"SLURM_BITSTR_LEN=0", "SLURM_TIME_FORMAT=%s", "SLURM_CONF=somewhere"} <= set(
            environment
        )


def test_a_throttled_array_with_a_requeued_task_is_told_task_by_task(tools: Tools) -> None:
    tools.accounting(
        """7_0|CANCELLED by 33|0:0|0:0|2|1795943743|n1|None
        7_1|REQUEUED|0:0|0:0|4|1795943743|n1|None
        7_2|RUNNING|0:0|0:0|9|1795943743|n1|JobArrayTaskLimit
        7_[3-5,9%2]|PENDING|0:0|0:0|0|1795943743|None assigned|JobArrayTaskLimit
        7_1|PENDING|0:0|0:0|0|1795943747|None assigned|BeginTime"""
    )
    tools.queue(error=NO_CONTROLLER)
    tools.control(error=NO_CONTROLLER)
    states = Watcher().look(["7"])
    assert names(states) == {
        0: "CANCELLED", 1: "PENDING", 2: "RUNNING", 3: "PENDING", 4: "PENDING", 5: "PENDING",
        9: "PENDING",
    }  # fmt: skip
    assert [states["7"][task].restarts for task in (0, 1, 2)] == [0, 1, 0]


def test_tasks_cancelled_while_they_waited_share_a_line(tools: Tools) -> None:
    tools.accounting(
        """7_0|COMPLETED|0:0|0:0|2|1795943743|n1|None
        7_1|REQUEUED|0:0|0:0|4|1795943743|n1|None
        7_[2-3%2]|CANCELLED by 33|0:0|0:0|0|1795943743|None assigned|JobArrayTaskLimit
        7_1|CANCELLED by 33|0:0|0:0|0|1795943747|None assigned|BeginTime"""
    )
    states = Watcher().look(["7"], tasks={"7": range(4)})
    assert names(states) == {0: "COMPLETED", 1: "CANCELLED", 2: "CANCELLED", 3: "CANCELLED"}
    assert all(s.is_final for of_job in states.values() for s in of_job.values())
    assert tools.calls("squeue") == []


def test_a_task_that_left_the_line_of_those_that_wait_counts_as_its_own(tools: Tools) -> None:
    tools.queue(error=NO_CONTROLLER)
    tools.control(error=NO_CONTROLLER)
    lines = (
        "7_3|RUNNING|0:0|0:0|9|1795943743|n1|None",
        "7_[3-5]|PENDING|0:0|0:0|0|1795943743|None assigned|None",
    )
    for text in ("\n".join(lines), "\n".join(reversed(lines))):
        tools.accounting(text)
        states = Watcher().look(["7"])
        assert names(states) == {3: "RUNNING", 4: "PENDING", 5: "PENDING"}
        assert states["7"][3].restarts == 0


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL"])
def test_an_end_after_which_slurm_starts_again_is_final_only_if_the_queue_says_so(
    tools: Tools, state: str
) -> None:
    tools.accounting(
        f"""7|{state}|0:0|0:0|17|1795943897|n3|None
        8|{state}|0:0|0:0|17|1795943897|n3|None"""
    )
    tools.queue(
        f"""7|PENDING|0|1||0:00|BeginTime
        8|{state}|36608|0|n3|0:17|None"""
    )
    watcher = Watcher(rest_s=0)
    states = watcher.look(["7", "8"])
    assert (states["7"][None].state, states["7"][None].restarts) == (State.PENDING, 1)
    assert (states["8"][None].state, states["8"][None].is_final) == (state, True)

    tools.queue(error=NO_CONTROLLER)
    tools.control(error=NO_CONTROLLER)
    unsure = one(Watcher())
    assert (unsure.state, unsure.is_final) == (state, False)

    tools.queue(error=NO_SUCH_JOB)
    assert one(Watcher()).is_final, "out of the queue: it does not come back"


def test_a_requeued_job_that_the_queue_forgot_is_not_running(tools: Tools) -> None:
    tools.accounting("7|REQUEUED|0:0|0:0|4|1795943743|n1|None")
    watcher = Watcher(patience_s=0.2)
    assert one(watcher).state is State.UNKNOWN
    time.sleep(0.3)
    assert one(watcher).state is State.LOST


def test_the_queue_is_ahead_of_accounting(tools: Tools) -> None:
    tools.accounting("7|PENDING|0:0|0:0|0|1795943743|None assigned|None")
    watcher = Watcher()
    tools.queue("7|RUNNING|0|0|n1|0:02|None")
    assert one(watcher).state is State.RUNNING
    tools.queue("7|COMPLETING|0|0|n1|0:02|None")
    assert one(watcher).state is State.COMPLETING
    tools.queue("7|COMPLETED|0|0|n1|0:02|None")
    assert one(watcher).is_final


def test_of_an_end_that_both_know_accounting_tells_more(tools: Tools) -> None:
    tools.accounting(
        """7_0|FAILED|1:0|0:125|9|1795943743|n1|None
        7_1|RUNNING|0:0|0:0|9|1795943743|n1|None"""
    )
    tools.queue(
        """7_0|FAILED|256|0|n1|0:09|NonZeroExitCode
        7_1|RUNNING|0|0|n1|0:09|None"""
    )
    assert names(Watcher().look(["7"])) == {0: "OUT_OF_MEMORY", 1: "RUNNING"}


def test_records_of_an_older_job_with_the_same_id_are_not_of_this_one(tools: Tools) -> None:
    tools.accounting("7|COMPLETED|0:0|0:0|0|1695943738|n1|None")
    tools.queue("7|PENDING|0|0||0:00|Priority")
    states = Watcher().look(["7"], since={"7": 1795943738.0})
    assert states["7"][None].state is State.PENDING
    assert one(Watcher()).state is State.COMPLETED


def test_without_accounting_the_queue_tells_how_jobs_ended(tools: Tools) -> None:
    tools.accounting(error=NO_ACCOUNTING)
    tools.queue(
        """9_4|CANCELLED|0|0||0:00|JobArrayTaskLimit
        7|FAILED|35072|0|n1|0:00|NonZeroExitCode
        8|OUT_OF_MEMORY|253|0|n1|0:27|OutOfMemory
        9_1|NODE_FAIL|0|0|n1|0:02|NodeDown"""
    )
    watcher = Watcher()
    states = watcher.look(["7", "8", "9"])
    assert names(states) == {None: "FAILED"}
    assert (states["7"][None].exit_code, states["7"][None].signal) == (137, 9)
    assert names(states, "8") == {None: "OUT_OF_MEMORY"}
    assert names(states, "9") == {1: "NODE_FAIL", 4: "CANCELLED"}
    assert all(s.is_final for of_job in states.values() for s in of_job.values())
    assert watcher.troubles == ()


def test_without_accounting_scontrol_is_asked_once_why_a_job_failed(tools: Tools) -> None:
    tools.accounting(error=NO_ACCOUNTING)
    tools.queue(
        """7|FAILED|256|0|n1|0:00|NonZeroExitCode
        8|RUNNING|0|0|n1|0:00|None"""
    )
    tools.control(
        SCONTROL.format(id=7, state="FAILED", code="1:0", steps="0:125")
        + "\n"
        + SCONTROL.format(id=8, state="RUNNING", code="0:0", steps="0:0")
    )
    watcher = Watcher()
    for _ in range(3):
        states = watcher.look(["7", "8"])
        assert (states["7"][None].state, states["7"][None].exit_code) == (State.OUT_OF_MEMORY, 1)
        assert (states["8"][None].state, states["8"][None].source) == (State.RUNNING, "squeue")
    assert len(tools.calls("scontrol")) == 1
    tools.queue(
        """7|FAILED|512|1|n1|0:00|NonZeroExitCode
        8|RUNNING|0|0|n1|0:00|None"""
    )
    tools.control(error=NO_CONTROLLER)
    again = watcher.look(["7", "8"])["7"][None]
    assert (again.state, again.exit_code) == (State.FAILED, 2), "that is another start"


def test_an_end_is_remembered_when_the_queue_has_forgotten_it(tools: Tools) -> None:
    tools.accounting(error=NO_ACCOUNTING)
    tools.queue("7|TIMEOUT|9|0|n1|1:27|TimeLimit")
    watcher = Watcher(patience_s=0)
    first = one(watcher)
    tools.queue(error=NO_SUCH_JOB)
    assert one(watcher) == first
    assert first.state is State.TIMEOUT


def test_a_job_is_lost_when_no_tool_knows_it_for_long_enough(tools: Tools) -> None:
    tools.queue("7|RUNNING|0|0|n1|0:02|None")
    watcher = Watcher(patience_s=0.3)
    assert one(watcher).state is State.RUNNING
    tools.queue(error=NO_SUCH_JOB)
    state = one(watcher)
    assert (state.state, state.is_final) == (State.UNKNOWN, False)
    assert "not in the queue" in state.reason
    time.sleep(0.4)
    lost = one(watcher)
    assert (lost.state, lost.is_final) == (State.LOST, True)
    assert "its end is not recorded" in lost.reason
    tools.accounting("7|COMPLETED|0:0|0:0|2|1795943743|n1|None")
    assert one(watcher).state is State.COMPLETED, "better late than never"


def test_a_task_that_leaves_no_trace_of_a_start_was_cancelled_while_it_waited(tools: Tools) -> None:
    tools.queue(
        """7_9|PENDING|0|0||0:00|JobArrayTaskLimit
        7_1|RUNNING|0|0|n1|0:02|None"""
    )
    watcher = Watcher(patience_s=0.2)
    watcher.look(["7"])
    tools.queue("7_1|RUNNING|0|0|n1|0:02|None")
    assert names(watcher.look(["7"])) == {1: "RUNNING", 9: "UNKNOWN"}
    time.sleep(0.3)
    states = watcher.look(["7"])
    assert names(states) == {1: "RUNNING", 9: "CANCELLED"}
    assert states["7"][9].reason == "left the queue while it waited"


def test_a_task_that_may_have_run_between_two_looks_is_lost(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.accounting(error=NO_ACCOUNTING)
    tools.queue("7_9|PENDING|0|0||0:00|JobArrayTaskLimit")
    watcher = Watcher(patience_s=0)
    watcher.look(["7"])
    tools.queue(error=NO_SUCH_JOB)
    monkeypatch.setattr(watch, "_ENDS_ARE_SHOWN_S", 0.0)  # as if the looks were far apart
    assert names(watcher.look(["7"])) == {9: "LOST"}


def test_a_job_that_accounting_calls_running_after_it_left_the_queue_is_lost(tools: Tools) -> None:
    tools.accounting("7|RUNNING|0:0|0:0|99999|1795943743|n1|None")
    watcher = Watcher(patience_s=0.2)
    assert one(watcher).state is State.UNKNOWN
    time.sleep(0.3)
    lost = one(watcher)
    assert (lost.state, lost.nodes) == (State.LOST, "n1")


def test_a_job_that_comes_back_was_not_missing(tools: Tools) -> None:
    watcher = Watcher(patience_s=0.3)
    assert one(watcher).state is State.UNKNOWN
    time.sleep(0.4)
    tools.queue("7|RUNNING|0|0|n1|0:02|None")
    assert one(watcher).state is State.RUNNING
    tools.queue(error=NO_SUCH_JOB)
    assert one(watcher).state is State.UNKNOWN, "the time before does not count"


def test_tasks_that_are_expected_are_told_of_before_slurm_knows_them(tools: Tools) -> None:
    tools.queue(error=NO_CONTROLLER)
    tools.control(error=NO_CONTROLLER)
    assert names(Watcher().look(["7"], tasks={"7": [1, 2]})) == {1: "UNKNOWN", 2: "UNKNOWN"}


def test_an_array_is_not_over_before_all_expected_tasks_are(tools: Tools) -> None:
    tools.accounting("7_0|COMPLETED|0:0|0:0|2|1795943743|n1|None")
    tools.queue(
        """7_0|COMPLETED|0|0|n1|0:02|None
        7_1|PENDING|0|0||0:00|Resources"""
    )
    states = Watcher().look(["7"], tasks={"7": range(2)})
    assert names(states) == {0: "COMPLETED", 1: "PENDING"}
    assert names(Watcher().look(["7"])) == {0: "COMPLETED", 1: "PENDING"}


def test_tools_that_are_down_lose_no_job(tools: Tools) -> None:
    tools.queue("7|RUNNING|0|0|n1|0:02|None")
    watcher = Watcher(patience_s=0, rest_s=0)
    assert one(watcher).state is State.RUNNING
    tools.accounting(error="sacct: error: Problem talking to the database: Connection refused")
    tools.queue(error=NO_CONTROLLER)
    tools.control(error=NO_CONTROLLER)
    state = one(watcher)
    assert state.state is State.RUNNING
    assert "Unable to contact slurm controller" in state.reason
    assert "Connection refused" in state.reason
    assert len(watcher.troubles) == 3
    tools.queue("7|RUNNING|0|0|n1|0:03|None")
    assert one(watcher).reason == ""


def test_accounting_that_is_down_is_given_ten_times_as_long(tools: Tools) -> None:
    tools.accounting(error="sacct: error: Problem talking to the database: Connection refused")
    watcher = Watcher(patience_s=0.2, rest_s=0)
    assert one(watcher).state is State.UNKNOWN
    time.sleep(0.3)
    assert one(watcher).state is State.UNKNOWN
    time.sleep(1.8)
    lost = one(watcher)
    assert lost.state is State.LOST
    assert "Connection refused" in lost.reason


def test_tools_that_hang_are_killed_and_not_asked_again_for_a_while(tools: Tools) -> None:
    tools.hang("sacct", "squeue")
    tools.control(SCONTROL.format(id=7, state="RUNNING", code="0:0", steps="0:0"))
    watcher = Watcher(timeout_s=1.5, rest_s=60)
    begin_s = time.monotonic()
    for _ in range(3):
        state = one(watcher)
        assert (state.state, state.source) == (State.RUNNING, "scontrol")
    assert time.monotonic() - begin_s < 20, "a child of the tool was waited for"
    assert [len(tools.calls(name)) for name in ("sacct", "squeue", "scontrol")] == [1, 1, 3]
    assert watcher.troubles == (
        "sacct: no answer within 1.5 s",
        "squeue: no answer within 1.5 s",
    )


def test_scontrol_is_asked_for_one_job_or_for_all(tools: Tools) -> None:
    Watcher().look(["7"])
    Watcher().look(["7", "8"])
    assert tools.calls("scontrol") == ["show job -d -o 7", "show job -d -o"]


def test_where_there_is_no_slurm_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    watcher = Watcher()
    assert one(watcher).state is State.UNKNOWN
    with pytest.raises(UserError, match="squeue: not installed here"):
        watcher.refuse_blindness()


def test_pauses_grow_and_stay_below_what_a_final_answer_may_take() -> None:
    pauses = watch.intervals()
    first = [next(pauses) for _ in range(100)]
    assert first[0] == 1.0
    assert first == sorted(first)
    assert set(first[10:50]) == {10.0}
    assert first[-1] == 20.0


def test_ten_thousand_tasks_are_counted(tools: Tools) -> None:
    lines = [f"7_{task}|COMPLETED|0:0|0:0|60|1795943743|n{task % 64}|None" for task in range(6000)]
    lines += [f"7_{task}|NODE_FAIL|0:0|0:0|9|1795943743|n1|None" for task in range(6000, 6100)]
    lines += [f"7_{task}|RUNNING|0:0|0:0|60|1795947000|n1|None" for task in range(6000, 6100)]
    lines.append("7_[6100-9999%100]|PENDING|0:0|0:0|0|1795943743|None assigned|None")
    tools.accounting("\n".join(lines))
    tools.queue(error=NO_CONTROLLER)
    tools.control(error=NO_CONTROLLER)
    states = Watcher().look(["7"], tasks={"7": range(10_000)})
    counted: dict[str, int] = {}
    for name in names(states).values():
        counted[name] = counted.get(name, 0) + 1
    assert counted == {"COMPLETED": 6000, "RUNNING": 100, "PENDING": 3900}
    assert sum(state.restarts for state in states["7"].values()) == 100
