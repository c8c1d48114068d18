# SPDX-License-Identifier: Apache-2.0
"""Faults of a run while it trains: spiking and non-finite losses, waiting for data."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Self

from fastvideo.config.train import Watch
from fastvideo.errors import Failed

REMEMBERED = 100
ENOUGH = 20
_SHOWN_CLIPS = 8


class LossWatch:
    """Remembers the losses of a run and counts the steps it leaves out.

    Values only: every process that is shown the same numbers decides the same.
    """

    def __init__(self, spec: Watch) -> None:
        """Start with nothing seen."""
        self._spec = spec
        self._recent: deque[float] = deque(maxlen=REMEMBERED)
        self._in_a_row = 0
        self._skipped = 0
        self._told_starved = False

    @classmethod
    def from_state(cls, spec: Watch, state: Mapping[str, Any]) -> Self:
        """Go on from what `state` returned."""
        watch = cls(spec)
        watch._recent.extend(state["recent"])
        watch._in_a_row, watch._skipped = state["in_a_row"], state["skipped"]
        return watch

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, values that JSON holds exactly."""
        return {
            "recent": list(self._recent),
            "in_a_row": self._in_a_row,
            "skipped": self._skipped,
        }

    @property
    def skipped_steps(self) -> int:
        """Steps left out since the run began."""
        return self._skipped

    def look(
        self, step: int, loss: float, grad_norm: float, clip_ids: Sequence[str] = ()
    ) -> list[str]:
        """Take note of a step whose loss and gradient are finite; return warnings."""
        assert math.isfinite(loss) and math.isfinite(grad_norm)
        usual = median(self._recent) if len(self._recent) >= ENOUGH else math.inf
        self._recent.append(loss)
        self._in_a_row = 0
        factor = self._spec.spike_factor
        if factor is None or loss <= factor * usual:
            return []
        return [
            f"step {step}: loss {loss:.4g} is {loss / usual:.1f} times the median of the last "
            f"{min(len(self._recent), REMEMBERED)} steps, {usual:.4g}; gradient norm "
            f"{grad_norm:.4g}{_name(clip_ids)}"
        ]

    def skipped(
        self, step: int, loss: float, grad_norm: float, clip_ids: Sequence[str] = ()
    ) -> str:
        """Count a step that was left out as its loss or gradient is not finite; return a warning.

        Raises:
            Failed: More than `max_skipped_steps` in a row.
        """
        self._in_a_row += 1
        self._skipped += 1
        found = (
            f"step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite"
            f"{_name(clip_ids)}"
        )
        limit = self._spec.max_skipped_steps
        if self._in_a_row > limit:
            raise Failed(
                f"{found}; {self._in_a_row} steps in a row, train.watch.max_skipped_steps is "
                f"{limit}. The last checkpoint is intact. Lower train.optimizer.lr, use "
                "train.dtype=float32, or look at the clips named"
            )
        return f"{found}; left out, {self._in_a_row} of at most {limit} in a row"

    def starved(self, wait_share: float) -> str | None:
        """Warn, the first time only, if the loop waits for data for too large a share of time."""
        if self._told_starved or wait_share <= self._spec.starved_share:
            return None
        self._told_starved = True
        return (
            f"the loop waits for data for {wait_share:.0%} of its time: raise "
            "train.loader_workers, or put the shards on a faster file system"
        )


def _name(clip_ids: Sequence[str]) -> str:
    if not clip_ids:
        return ""
    shown = ", ".join(clip_ids[:_SHOWN_CLIPS])
    more = len(clip_ids) - _SHOWN_CLIPS
    return f"; clips: {shown}" + (f" and {more} more" if more > 0 else "")
