# SPDX-License-Identifier: Apache-2.0
"""What became of Slurm's jobs: never hangs, and says so where it does not know."""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fastvideo.errors import UserError
from fastvideo.launch import slurm_output
from fastvideo.launch.slurm_output import Row
from fastvideo.launch.slurm_tools import Tool
from fastvideo.launch.states import State, TaskState

Task = int | None
"""Number of a task in its array; None where there is no array."""
States = dict[str, dict[Task, TaskState]]
"""By the id of the job, then by task."""

# Clocks of a login node and of the accounting may differ; ids are not used again that soon.
_CLOCKS_DIFFER_S = 3600.0
# What a controller keeps ended jobs for, at least; its default is five minutes.
_ENDS_ARE_SHOWN_S = 60.0
_NO_END = "its end is not recorded"


class Watcher:
    """Asks sacct, then squeue, then scontrol, once for all jobs, and remembers what they said.

    Accounting lags behind the queue and knows ends for ever; the queue knows the present, and ends
    for some minutes. So sacct is believed where it says that a task ended. Everything else is
    decided by the queue, where that answers.

    Args:
        patience_s: How long a task has to be missing from all answers before it counts as LOST. Ten
            times as long while the accounting that should know it is out of order.
        timeout_s: How long a tool may take.
        rest_s: How long a tool that failed is not asked again.
    """

    def __init__(
        self,
        *,
        patience_s: float = 30.0,
        timeout_s: float = 10.0,
        rest_s: float = 30.0,
    ) -> None:
        self._patience_s = patience_s
        self._sacct = Tool("sacct", timeout_s, rest_s)
        self._squeue = Tool("squeue", timeout_s, rest_s)
        self._scontrol = Tool("scontrol", timeout_s, rest_s)
        self._heard: States = {}
        self._missing_since: dict[tuple[str, Task], float] = {}
        self._looked_s = 0.0
        self._looks_often = False

    @property
    def troubles(self) -> tuple[str, ...]:
        """What keeps tools from answering; a cluster may do without accounting."""
        sacct = "" if self._sacct.never_answers else self._sacct.trouble
        return tuple(filter(None, (sacct, self._squeue.trouble, self._scontrol.trouble)))

    def look(
        self,
        ids: Sequence[str],
        *,
        tasks: Mapping[str, Collection[int]] | None = None,
        since: Mapping[str, float] | None = None,
    ) -> States:
        """How all tasks of some jobs are now.

        Args:
            ids: What sbatch printed, without the number of a task.
            tasks: The tasks of those that are arrays. Without it only tasks are known that Slurm
                tells of.
            since: When jobs were submitted, since the epoch. Older records are of other jobs that
                had the same ids.
        """
        self._looks_often = time.monotonic() - self._looked_s < _ENDS_ARE_SHOWN_S
        self._looked_s = time.monotonic()
        expected = {job: (tasks or {}).get(job, ()) for job in ids}
        accounts = self._ask_accounting(ids, since or {})
        asked = [job for job in ids if not _settled(accounts.get(job, {}), expected[job])]
        queue, answered = self._ask_queue(asked)
        states: States = {}
        for job in ids:
            account, queued = accounts.get(job, {}), queue.get(job, {})
            known = {*account, *queued, *expected[job], *self._heard.get(job, {})}
            numbers = sorted(task for task in known if task is not None)
            states[job] = {
                task: self._judge((job, task), account.get(task), queued.get(task), answered)
                for task in numbers or (None,)
            }
        return states

    def turns(self, *, timeout_s: float | None = None) -> Iterator[None]:
        """Turns to look, with growing pauses between them, until the time is up.

        Raises:
            UserError: None of the tools is here, so that nobody will ever know.
        """
        deadline_s = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
        for pause_s in intervals():
            yield
            self.refuse_blindness()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            # A missing task is decided in time, however old its job is.
            longest_s = 5.0 if self._missing_since else math.inf
            time.sleep(min(pause_s, left_s, longest_s))

    def refuse_blindness(self) -> None:
        """Complain if none of the tools is here: nothing would ever be known.

        Raises:
            UserError: None is.
        """
        tools = (self._sacct, self._squeue, self._scontrol)
        if all(tool.trouble and tool.never_answers for tool in tools):
            troubles = "; ".join(tool.trouble for tool in tools)
            raise UserError(f"{troubles}: watch jobs where Slurm is installed")

    def _ask_accounting(self, ids: Sequence[str], since: Mapping[str, float]) -> States:
        """The latest start of each task; the starts before it are counted."""
        if not ids:
            return {}
        fields = ",".join(slurm_output.SACCT_FIELDS)
        # Without -X there would be lines of steps, without -D none of the starts before.
        text = self._sacct.ask("-n", "-P", "-X", "-D", "-a", "-j", ",".join(ids), "-o", fields)
        rows = [
            row
            for row in slurm_output.sacct_rows(text or "")
            if row.submitted_s is None
            or row.submitted_s > since.get(row.job, 0.0) - _CLOCKS_DIFFER_S
        ]
        # Tasks leave the line of those that wait when they start; that line is the older news.
        rows.sort(key=lambda row: (not row.waits, row.submitted_s or 0.0))
        found: States = {}
        started = set[tuple[str, Task]]()
        for row in rows:
            of_job = found.setdefault(row.job, {})
            state = replace(row.state, may_return=row.state.state.may_return)
            for task in row.tasks:
                again = (row.job, task) in started
                of_job[task] = (
                    replace(state, restarts=of_job[task].restarts + 1) if again else state
                )
                if not row.waits:
                    started.add((row.job, task))
        return found

    def _ask_queue(self, ids: Sequence[str]) -> tuple[States, bool]:
        """What Slurm's controller knows, and whether it answered."""
        if not ids:
            return {}, True
        fields = ":|,".join(slurm_output.SQUEUE_FIELDS)
        text = self._squeue.ask(
            "-h", "-a", "-r", "-t", "all", "-j", ",".join(ids), "-O", f"{fields}:"
        )
        found = _by_task(slurm_output.squeue_rows(text or ""))
        unclear = [job for job in ids if job not in found or self._just_failed(job, found[job])]
        if not unclear:
            return found, True
        only = unclear if len(unclear) == 1 else ()  # it takes one job, or shows all
        shown = self._scontrol.ask("show", "job", "-d", "-o", *only)
        more = _by_task(slurm_output.scontrol_rows(shown or ""))
        for job in set(unclear) & set(more):
            of_job = found.setdefault(job, more[job])
            failed = [task for task in of_job if of_job[task].state is State.FAILED]
            of_job |= {task: more[job][task] for task in failed if task in more[job]}
        return found, text is not None or shown is not None

    def _just_failed(self, job: str, queued: Mapping[Task, TaskState]) -> bool:
        """Whether scontrol may know better: of a step that was out of memory squeue is silent."""
        heard = self._heard.get(job, {})
        return any(
            state.state is State.FAILED and not (task in heard and heard[task].is_final)
            for task, state in queued.items()
        )

    def _judge(
        self,
        key: tuple[str, Task],
        account: TaskState | None,
        queued: TaskState | None,
        answered: bool,
    ) -> TaskState:
        last = self._heard.get(key[0], {}).get(key[1], TaskState(State.UNKNOWN))
        if queued is not None:
            # Of the same end the queue tells least.
            if queued.is_final and account is not None and account.is_final:
                queued = account
            elif queued.is_final and last.is_final and last.restarts == queued.restarts:
                queued = last if last.state is not State.LOST else queued
            return self._note(key, queued)
        if last.is_final and account is not None and account.restarts < last.restarts:
            return last  # accounting lags behind
        if account is not None and account.state.ends and (answered or not account.may_return):
            return self._note(key, replace(account, may_return=False))
        if answered:
            return self._miss(key, account, last)
        if account is not None:
            return self._note(key, account)
        return last if last.is_final else replace(last, reason="; ".join(self.troubles))

    def _note(self, key: tuple[str, Task], state: TaskState) -> TaskState:
        self._heard.setdefault(key[0], {})[key[1]] = state
        self._missing_since.pop(key, None)
        return state

    def _miss(self, key: tuple[str, Task], account: TaskState | None, last: TaskState) -> TaskState:
        """The queue does not have it any more, and no tool knows how it ended."""
        if last.is_final:
            self._missing_since.pop(key, None)
            return last
        if key not in self._missing_since and self._sacct.trouble and not self._looks_often:
            last = self._note(key, replace(last, state=State.UNKNOWN))  # it may have run meanwhile
        now_s = time.monotonic()
        missing_s = now_s - self._missing_since.setdefault(key, now_s)
        down = self._sacct.trouble and not self._sacct.never_answers
        known = account or last
        if missing_s < (10 * (self._patience_s or 30.0) if down else self._patience_s):
            reason = f"not in the queue; {self._sacct.trouble or 'its end is not recorded yet'}"
            return replace(known, state=State.UNKNOWN, reason=reason)
        state, reason = State.LOST, f"left the queue; {self._sacct.trouble or _NO_END}"
        if key[1] is not None and account is None and last.state is State.PENDING:
            # Of a task that is cancelled while others of its array wait Slurm keeps no trace.
            state, reason = State.CANCELLED, "left the queue while it waited"
        return self._note(key, replace(known, state=state, reason=reason, may_return=False))


def intervals() -> Iterator[float]:
    """Seconds between looks: 1 at first, then 10, and 20 for what takes longer than ten minutes."""
    pause_s, waited_s = 1.0, 0.0
    while True:
        yield pause_s
        waited_s += pause_s
        pause_s = 20.0 if waited_s > 600 else min(pause_s * 1.5, 10.0)


def _settled(account: Mapping[Task, TaskState], expected: Collection[int]) -> bool:
    """Whether accounting alone knows how all of a job ended."""
    if not all(task in account for task in expected or (None,)):
        return False
    return all(state.is_final for state in account.values())


def _by_task(rows: Iterable[Row]) -> States:
    found: States = {}
    for row in rows:
        found.setdefault(row.job, {}).update(dict.fromkeys(row.tasks, row.state))
    return found
