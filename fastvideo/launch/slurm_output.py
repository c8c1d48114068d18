# SPDX-License-Identifier: Apache-2.0
"""Reads what sacct, squeue and scontrol print; lines that make no sense are left out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastvideo.launch.states import State, TaskState

SACCT_FIELDS = (
    "JobID",
    "State",
    "ExitCode",
    "DerivedExitCode",
    "ElapsedRaw",
    "Submit",
    "NodeList",
    "Reason",
)
SQUEUE_FIELDS = (
    "JobArrayID",
    "State",
    "exit_code",
    "RestartCnt",
    "NodeList",
    "TimeUsed",
    "Reason",
)

_ID = re.compile(r"(?P<job>\d+)(?:_(?:(?P<task>\d+)|\[(?P<tasks>[^]]*)\]?)|\+(?P<part>\d+))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_ELAPSED = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
# Slurm's stand-in for a signal where the kernel ended a process for want of memory.
_OUT_OF_MEMORY = 125


@dataclass(frozen=True, slots=True)
class Row:
    """What one line says of one job, or of some tasks of an array."""

    job: str
    tasks: tuple[int | None, ...]
    """None alone where there is no array."""
    state: TaskState
    submitted_s: float | None = None
    """When it was queued, the last time; since the epoch."""

    @property
    def waits(self) -> bool:
        """Whether it stands for tasks that have no record of their own yet."""
        return len(self.tasks) != 1


def sacct_rows(text: str) -> Iterator[Row]:
    """Lines of ``sacct -n -P -X -D`` with ``SACCT_FIELDS``, times in seconds since the epoch.

    A task that was queued again has a line for each of its starts.
    """
    for line in text.splitlines():
        fields = line.split("|", len(SACCT_FIELDS) - 1)
        found = _job_and_tasks(fields[0])
        if found is None or len(fields) != len(SACCT_FIELDS):
            continue
        _, words, exit_code, of_steps, elapsed_s, submit, nodes, reason = fields
        state = TaskState(
            _state(words.partition(" ")[0]),
            reason=_account_reason(words, _given(reason)),
            nodes=_given(nodes),
            elapsed_s=float(elapsed_s) if elapsed_s.isdecimal() else None,
            source="sacct",
        )
        submitted_s = float(submit) if submit.isdecimal() else None
        yield Row(*found, _ended(state, exit_code, of_steps), submitted_s)


def squeue_rows(text: str) -> Iterator[Row]:
    """Lines of ``squeue -h -r -O`` with ``SQUEUE_FIELDS``, each but the last followed by ``|``."""
    for line in text.splitlines():
        fields = line.split("|", len(SQUEUE_FIELDS) - 1)
        found = _job_and_tasks(fields[0].strip())
        if found is None or len(fields) != len(SQUEUE_FIELDS):
            continue
        _, word, exit_code, restarts, nodes, elapsed, reason = map(str.strip, fields)
        state = TaskState(
            _state(word),
            reason=_queue_reason(word, _given(reason)),
            nodes=_given(nodes),
            restarts=int(restarts) if restarts.isdecimal() else 0,
            elapsed_s=_seconds(elapsed),
            source="squeue",
        )
        yield Row(*found, _ended(state, exit_code))


def scontrol_rows(text: str) -> Iterator[Row]:
    """Lines of ``scontrol show job -d -o``.

    Names, commands and comments are free text in the same line, after the id. Where one of them
    looks like a field that is read here, that field is not known.
    """
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is None:
            continue
        job, array, tasks, leader, part = head.groups()
        found = _job_and_tasks(f"{array or leader or job}{_suffix(tasks, part)}")
        if found is None:
            continue
        fields = {key: _only(pattern.findall(line)) for key, pattern in _KEYS.items()}
        state = TaskState(
            _state(fields["JobState"]),
            reason=_queue_reason(fields["JobState"], _given(fields["Reason"])),
            nodes=_given(fields["NodeList"]),
            restarts=int(fields["Restarts"]) if fields["Restarts"].isdecimal() else 0,
            elapsed_s=_seconds(fields["RunTime"]),
            source="scontrol",
        )
        yield Row(*found, _ended(state, fields["ExitCode"], fields["DerivedExitCode"]))


_HEAD = re.compile(
    r"JobId=(\d+) (?:ArrayJobId=(\d+) ArrayTaskId=(\S+) )?(?:ArrayTaskThrottle=\d+ )?"
    r"(?:HetJobId=(\d+) HetJobOffset=(\d+) )?JobName="
)
_KEYS = {
    key: re.compile(rf" {key}=(\S*)")
    for key in (
        "JobState",
        "Reason",
        "Restarts",
        "ExitCode",
        "DerivedExitCode",
        "RunTime",
        "NodeList",
    )
}


def _suffix(tasks: str | None, part: str | None) -> str:
    """What squeue would put behind the number of the job."""
    if tasks is not None:
        return f"_{tasks}" if tasks.isdecimal() else f"_[{tasks}]"
    return "" if part is None else f"+{part}"


def _only(values: list[str]) -> str:
    return values[0] if len(values) == 1 else ""


def expand(tasks: str) -> tuple[int, ...]:
    """The tasks of ``4-7,9,20-30:5%2``, without what was cut off behind ``...``."""
    found: list[int] = []
    for part in tasks.partition("%")[0].split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            continue
        first, last, step = match.groups()
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(found)


def _job_and_tasks(text: str) -> tuple[str, tuple[int | None, ...]] | None:
    """None for what is no job: steps, and parts of heterogeneous jobs but the one that leads."""
    match = _ID.fullmatch(text)
    if match is None or match["part"] not in (None, "0"):
        return None
    if match["task"] is not None:
        return match["job"], (int(match["task"]),)
    if match["tasks"] is not None:
        return match["job"], expand(match["tasks"])
    return match["job"], (None,)


def _account_reason(words: str, reason: str) -> str:
    """Sacct tells the reason for which a task waited, also long after it began."""
    if " by " in words:
        return words
    if words == State.CANCELLED and reason == "Dependency":
        return "DependencyNeverSatisfied"  # by nobody: that is --kill-on-invalid-dep
    return reason if words in (State.PENDING, State.REQUEUE_HOLD, State.SPECIAL_EXIT) else ""


def _queue_reason(word: str, reason: str) -> str:
    """Squeue and scontrol keep the reason for which a task waited when that task is cancelled."""
    if word == State.CANCELLED and reason != "DependencyNeverSatisfied":
        return ""
    return reason


def _ended(state: TaskState, exit_code: str, of_steps: str = "") -> TaskState:
    """Add how it ended; what Slurm prints for a task that has not ended is of an earlier start."""
    if not state.state.ends:
        return state
    code, signal = _codes(exit_code)
    _, signal_of_steps = _codes(of_steps)
    if state.state is State.FAILED and _OUT_OF_MEMORY in (signal, signal_of_steps):
        # Slurm itself calls a job so if its script was hit, but not if a step was.
        state = replace(state, state=State.OUT_OF_MEMORY)
    if state.state is State.COMPLETED:
        return replace(state, exit_code=code)
    if code and code == signal_of_steps:
        code += 128  # which older versions of sacct take off
    if not signal and code and code > 128:
        signal = code - 128  # as shells and srun put it
    return replace(state, exit_code=code or None, signal=_real(signal or signal_of_steps))


def _codes(text: str) -> tuple[int, int]:
    """Exit code and signal of ``1:0``, or of what wait() returns, as older squeues print it."""
    code, _, signal = text.partition(":")
    if signal.isdecimal() and code.isdecimal():
        return int(code), int(signal)
    status = int(code) if code.isdecimal() else 0
    return status >> 8 & 255, status & 127


def _real(signal: int) -> int | None:
    """Slurm has numbers of its own, for want of memory or a dead node."""
    return signal if 0 < signal <= 64 else None


def _state(word: str) -> State:
    """Also of words that Slurm may learn, and of ``?``."""
    try:
        return State(word.rstrip("+*"))
    except ValueError:
        return State.UNKNOWN


def _given(text: str) -> str:
    """Slurm's several ways to say nothing, as nothing."""
    return "" if text in ("None", "None assigned", "(null)", "N/A", "n/a") else text


def _seconds(elapsed: str) -> float | None:
    """Of ``1-02:03:04``, ``03:04``."""
    match = _ELAPSED.fullmatch(elapsed)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
