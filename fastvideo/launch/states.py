# SPDX-License-Identifier: Apache-2.0
"""What can become of a task of a job, in Slurm's names."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Slurm's names of states, and two of our own."""

    UNKNOWN = "UNKNOWN"
    """Ours: nobody has told yet."""
    LOST = "LOST"
    """Ours: gone from the queue, and no record says how it ended."""

    PENDING = "PENDING"
    CONFIGURING = "CONFIGURING"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    STOPPED = "STOPPED"
    SIGNALING = "SIGNALING"
    RESIZING = "RESIZING"
    EXPEDITING = "EXPEDITING"
    STAGE_OUT = "STAGE_OUT"
    COMPLETING = "COMPLETING"
    REQUEUED = "REQUEUED"
    REQUEUE_FED = "REQUEUE_FED"
    REQUEUE_HOLD = "REQUEUE_HOLD"
    RESV_DEL_HOLD = "RESV_DEL_HOLD"
    SPECIAL_EXIT = "SPECIAL_EXIT"

    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DEADLINE = "DEADLINE"
    BOOT_FAIL = "BOOT_FAIL"
    REVOKED = "REVOKED"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"

    @property
    def ends(self) -> bool:
        """Whether it is how a start of a task ends, unless the task is queued again."""
        return self in _ENDS

    @property
    def may_return(self) -> bool:
        """Whether Slurm itself queues a task again that ended like this, where it is allowed to."""
        return self in (State.NODE_FAIL, State.PREEMPTED)


_ENDS = frozenset(
    {
        State.LOST,
        State.COMPLETED,
        State.FAILED,
        State.CANCELLED,
        State.TIMEOUT,
        State.OUT_OF_MEMORY,
        State.DEADLINE,
        State.BOOT_FAIL,
        State.REVOKED,
        State.NODE_FAIL,
        State.PREEMPTED,
    }
)


@dataclass(frozen=True, slots=True)
class TaskState:
    """One task of an array, or a job without an array, as it was last heard of."""

    state: State
    reason: str = ""
    """Why it is so, in Slurm's words or ours: ``Dependency``, ``CANCELLED by 1001``."""
    exit_code: int | None = None
    """What the script returned, of a task that ended."""
    signal: int | None = None
    """What killed it, or its step."""
    nodes: str = ""
    """``n[1-2]``."""
    restarts: int = 0
    """How often it was queued again."""
    elapsed_s: float | None = None
    """Of its latest start."""
    source: str = ""
    """Who says so: ``sacct``, ``squeue``, ``scontrol``, or nobody."""
    may_return: bool = False
    """It ended in a way after which Slurm may start it again, and the queue could not be asked."""

    @property
    def is_final(self) -> bool:
        """Whether nothing more is to be expected."""
        return self.state.ends and not self.may_return
