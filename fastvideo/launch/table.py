# SPDX-License-Identifier: Apache-2.0
"""Jobs as text for people: what each part does, why one failed, and how to go on."""

import shlex
import time
from collections.abc import Sequence

from fastvideo.launch.states import State
from fastvideo.launch.statuses import JobStatus, PartStatus, reasons

SHOWN_REASONS = 8
SHOWN_CHARS = 600


def describe(statuses: Sequence[JobStatus]) -> str:
    """The jobs of a run, one after the other."""
    return "\n".join(line for status in statuses for line in _job(status))


def _job(status: JobStatus) -> list[str]:
    record = status.record
    when = time.strftime("%m-%d %H:%M", time.localtime(record.created))
    lines = [f"job     {status.folder.name}  {status.state}  ({record.executor}, {when})"]
    lines += [_part(part) for part in status.parts.values()]
    told = reasons(status)
    for text in told[:SHOWN_REASONS]:
        lines += [f"        {line}" for line in _short(text).splitlines()]
    if len(told) > SHOWN_REASONS:
        lines.append(f"        and {len(told) - SHOWN_REASONS} more, see --json")
    if status.is_final and status.state != State.COMPLETED:
        lines.append(f"        logs: {status.folder.root}")
        lines.append(f"        to go on: {shlex.join(record.command)}")
    return lines


def _part(status: PartStatus) -> str:
    part = status.part
    state, tasks = str(status.state), ""
    if part.tasks is not None:
        tasks = ", ".join(f"{count} {name}" for name, count in sorted(status.counts.items()))
    first = next(iter(status.tasks.values()))
    waits = status.state in (State.PENDING, State.UNKNOWN) and first.reason != "None"
    waiting = first.reason if waits else ""
    where = first.nodes if part.tasks is None and status.state == State.RUNNING else ""
    elapsed = _elapsed(first.elapsed_s) if part.tasks is None else ""
    restarts = sum(task.restarts for task in status.tasks.values())
    again = f"queued again {restarts} time{'s' if restarts > 1 else ''}" if restarts else ""
    facts = ", ".join(text for text in (tasks, waiting, where, elapsed, again) if text)
    return f"        {part.name:<12} {part.slurm_id or '':<10} {state:<13} {facts}".rstrip()


def _elapsed(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
