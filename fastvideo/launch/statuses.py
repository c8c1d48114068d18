# SPDX-License-Identifier: Apache-2.0
"""How far jobs are, of one run or one by one.

What Slurm or the local executor says of a task is joined with the words that its processes left:
these know why it failed, and that it is done even where nobody remembers the job.
"""

import collections
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastvideo import atomic
from fastvideo.errors import EXIT_DONE
from fastvideo.launch import local
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.record import Part, Record, job_folders
from fastvideo.launch.states import State, TaskState
from fastvideo.launch.watch import States, Watcher
from fastvideo.launch.word import Word, newest_words
from fastvideo.state import ranges

WORST = (
    State.FAILED,
    State.OUT_OF_MEMORY,
    State.TIMEOUT,
    State.NODE_FAIL,
    State.BOOT_FAIL,
    State.DEADLINE,
    State.LOST,
    State.REVOKED,
    State.PREEMPTED,
    State.CANCELLED,
)
"""Ends of tasks, from that which says most about why a part failed."""
NEW_S = 30.0
"""For so long after a submission a job that nobody knows may still come."""
LOOKED_AT = 50
"""The newest jobs of a run are looked at; older ones are over."""
SUBMITTING_S = 300.0
"""A part that has no id so long after its job was made was never handed over."""


@dataclass(frozen=True)
class PartStatus:
    """How far a part is."""

    part: Part
    tasks: Mapping[int, TaskState]
    words: Mapping[int, Word]
    """The newest of each task that ended, or that nobody knows of, and is not known to be done."""

    @property
    def is_final(self) -> bool:
        """Whether nothing more is to be expected of any task."""
        return all(task.is_final for task in self.tasks.values())

    @property
    def state(self) -> State:
        """That of the part as a whole: of its tasks the one that says most."""
        states = {task.state for task in self.tasks.values()}
        if self.is_final:
            return next((state for state in WORST if state in states), State.COMPLETED)
        if len(states) == 1:
            return next(iter(states))
        waits = states <= {State.UNKNOWN, State.PENDING, State.CONFIGURING, State.REQUEUED}
        return State.PENDING if waits else State.RUNNING

    @property
    def counts(self) -> dict[str, int]:
        """Tasks by state."""
        return dict(collections.Counter(str(task.state) for task in self.tasks.values()))

    def why(self, task: int) -> str:
        """What is known about why a task is not done, or an empty text."""
        state, word = self.tasks[task], self.words.get(task)
        if state.state == State.COMPLETED:
            return ""
        if word is not None and word.message and (state.is_final or word.code != EXIT_DONE):
            return word.message
        ended = f"exit code {state.exit_code}" if state.exit_code else ""
        killed = f"signal {state.signal}" if state.signal else ""
        known = [text for text in (state.reason, ended, killed) if text and text != "None"]
        return ", ".join(known)


@dataclass(frozen=True)
class JobStatus:
    """How far a job is."""

    folder: JobFolder
    record: Record
    parts: Mapping[str, PartStatus]

    @property
    def is_final(self) -> bool:
        """Whether nothing more is to be expected."""
        return all(part.is_final for part in self.parts.values())

    @property
    def state(self) -> State:
        """That of the first part that is not done; COMPLETED if all are."""
        states = [part.state for part in self.parts.values() if part.state != State.COMPLETED]
        failed = [state for state in states if state.ends and state != State.CANCELLED]
        running = [state for state in states if not state.ends]
        return next(iter(running or failed or states), State.COMPLETED)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "job": self.folder.name,
            "verb": self.record.verb,
            "state": str(self.state),
            "parts": {
                name: {
                    "state": str(part.state),
                    "id": part.part.slurm_id,
                    "tasks": part.counts,
                    "why": {task: why for task in part.tasks if (why := part.why(task))},
                }
                for name, part in self.parts.items()
            },
        }


def reasons(status: JobStatus) -> list[str]:
    """A line for each task that is not done and says why, the same reason told once for a part."""
    found = []
    for name, part in status.parts.items():
        by_reason: dict[tuple[State, str], list[int]] = {}
        for number, task in part.tasks.items():
            if task.state != State.COMPLETED and task.is_final:
                by_reason.setdefault((task.state, part.why(number)), []).append(number)
        for (state, why), numbers in by_reason.items():
            which = f" task {_few(numbers)}" if part.part.tasks is not None else ""
            found.append(f"{name}{which}: {state}{': ' if why else ''}{why}")
    return found


def _few(numbers: Sequence[int]) -> str:
    text = ranges(numbers)
    return text if len(text) <= 40 else text[:37] + "..."


# ---------------------------------------------------------------- many jobs


def statuses(
    folders: Iterable[JobFolder], *, watcher: Watcher | None = None
) -> Iterator[JobStatus]:
    """How far jobs are, asking Slurm once for all; folders without a record are left out."""
    read = [(folder, Record.read(folder)) for folder in folders]
    records = [(folder, record) for folder, record in read if record is not None]
    kept = {folder.name: _read_final(folder, record) for folder, record in records}
    open_ones = [record for folder, record in records if kept[folder.name] is None]
    told = _ask(open_ones, watcher) if open_ones else {}
    for folder, record in records:
        status = kept[folder.name]
        if status is None:
            status = _status(folder, record, told)
            if status.is_final:
                _write_final(status)
        yield status


def recent(run_dir: Path, *, watcher: Watcher | None = None) -> list[JobStatus]:
    """Jobs of a run to show, the oldest first: those that are not over, and the newest that is."""
    found = list(statuses(itertools.islice(job_folders(run_dir), LOOKED_AT), watcher=watcher))
    over = [status for status in found if status.is_final]
    return [status for status in reversed(found) if not status.is_final or status in over[:1]]


def under_way(run_dir: Path) -> Iterator[JobStatus]:
    """Jobs of a run that are not over, as far as anybody knows."""
    for status in statuses(itertools.islice(job_folders(run_dir), LOOKED_AT)):
        if not status.is_final:
            yield status


def _ask(records: Sequence[Record], watcher: Watcher | None) -> States:
    """What Slurm says of all parts."""
    parts = [(part, record) for record in records for part in record.parts if part.slurm_id]
    if not parts:
        return {}
    newest_s = max(record.created for record in records)
    # The queue knows a job as soon as it is submitted: one that is missing later will not come.
    patience_s = 0.0 if time.time() - newest_s > NEW_S else NEW_S
    return (watcher or Watcher(patience_s=patience_s)).look(
        [str(part.slurm_id) for part, _ in parts],
        tasks={str(part.slurm_id): part.tasks for part, _ in parts if part.tasks},
        since={str(part.slurm_id): record.created for part, record in parts},
    )


def _status(folder: JobFolder, record: Record, told: States) -> JobStatus:
    here = _local(folder) if record.executor == "local" else {}
    found = {}
    for part in record.parts:
        if record.executor == "local":
            states = dict.fromkeys(part.numbers, _not_submitted(record)) | here.get(part.name, {})
        elif part.slurm_id is None:
            states = dict.fromkeys(part.numbers, _not_submitted(record))
        else:
            states = _of_slurm(part, told.get(part.slurm_id, {}))
        nothing = TaskState(State.UNKNOWN)
        found[part.name] = _joined(
            folder, part, {number: states.get(number, nothing) for number in part.numbers}
        )
    return JobStatus(folder, record, found)


def _joined(folder: JobFolder, part: Part, told: Mapping[int, TaskState]) -> PartStatus:
    """What the queue knows, with the words of those tasks where they say more."""
    open_ones = [number for number, state in told.items() if _is_open(state)]
    words = newest_words(folder.part(part.name), open_ones)
    tasks = {number: _with_word(state, words.get(number)) for number, state in told.items()}
    return PartStatus(part, tasks, words)


def _is_open(state: TaskState) -> bool:
    """Whether a word could add something: why it failed, or that it is done."""
    return state.state == State.UNKNOWN or (state.is_final and state.state != State.COMPLETED)


def _of_slurm(part: Part, told: Mapping[int | None, TaskState]) -> dict[int, TaskState]:
    if part.tasks is None:
        return {0: told[None]} if None in told else {}
    return {number: state for number, state in told.items() if number is not None}


def _not_submitted(record: Record) -> TaskState:
    if record.refused:
        return TaskState(State.CANCELLED, reason="not submitted")
    if time.time() - record.created < SUBMITTING_S:
        return TaskState(State.UNKNOWN, reason="being submitted")
    return TaskState(State.CANCELLED, reason="was never submitted, as its submission was killed")


def _local(folder: JobFolder) -> dict[str, dict[int, TaskState]]:
    found = local.read_local(folder).items()
    return {name: {n: _of_local(task) for n, task in tasks.items()} for name, tasks in found}


def _of_local(task: local.LocalTask) -> TaskState:
    elapsed_s = None if task.started is None else (task.ended or time.time()) - task.started
    return TaskState(
        State(task.state),
        reason=task.reason,
        exit_code=task.exit_code,
        signal=task.signal,
        nodes=task.host,
        elapsed_s=elapsed_s,
        source="local",
    )


def _with_word(state: TaskState, word: Word | None) -> TaskState:
    """What is known of a task that nobody remembers: its own last word.

    While the queue cannot be asked, only that it is done: a start that failed may have been
    followed by another one.
    """
    if word is None or word.requeue or word.restart < state.restarts:
        return state
    if word.code == EXIT_DONE and state.state in (State.LOST, State.UNKNOWN):
        return replace(state, state=State.COMPLETED, exit_code=word.code, source="word")
    if state.state == State.LOST:
        return replace(state, state=State.FAILED, exit_code=word.code, source="word")
    return state


# ---------------------------------------------------------------- what is over


def _final_file(folder: JobFolder) -> Path:
    return folder.root / "final.json"


def _write_final(status: JobStatus) -> None:
    """Remember how a job ended: Slurm forgets, and need not be asked again."""
    value = {
        name: {str(number): asdict(task) for number, task in part.tasks.items()}
        for name, part in status.parts.items()
    }
    try:
        atomic.write_json(_final_file(status.folder), value, point="final")
    except OSError:  # of somebody else's run, say, or on a full disk: then Slurm is asked again
        return


def _read_final(folder: JobFolder, record: Record) -> JobStatus | None:
    value = atomic.read_json(_final_file(folder))
    if not isinstance(value, dict):
        return None
    parts = {}
    for part in record.parts:
        tasks = {
            int(number): TaskState(**{**task, "state": State(task["state"])})
            for number, task in value[part.name].items()
        }
        parts[part.name] = _joined(folder, part, tasks)
    return JobStatus(folder, record, parts)
