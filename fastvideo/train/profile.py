# SPDX-License-Identifier: Apache-2.0
"""A trace of a few steps with torch's profiler."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerAction, profile, schedule

from fastvideo.config.train import Profile
from fastvideo.log import logger

_ROWS = 40


class Profiler:
    """Records the steps that ``spec`` names, as this process counts them; without one, nothing.

    ``first_step`` counts from the first step of this process: a resumed run, whose first steps warm
    up anew, records anew. Training may end at any time: what was recorded by then is written.
    """

    def __init__(
        self, spec: Profile | None, folder: Path, *, rank: int, start_step: int = 0
    ) -> None:
        """Write to ``folder``; ``start_step`` steps were finished before, for the files' names."""
        self._folder, self._rank = folder, rank
        self._profile: profile | None = None
        if spec is not None:
            self._first_step = start_step + spec.first_step
            self._profile = profile(
                schedule=_schedule(spec), on_trace_ready=self._write, record_shapes=True
            )

    def __enter__(self) -> Self:
        """Begin to count."""
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self) -> None:
        """Say that an optimizer step is finished."""
        if self._profile is not None:
            self._profile.step()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what was recorded and not written yet."""
        if self._profile is not None:
            self._profile.stop()

    def _write(self, recorded: profile) -> None:
        """A trace for chrome://tracing or perfetto.dev, and a table of what took longest."""
        path = self._folder / f"rank-{self._rank}-step-{self._first_step}.json.gz"
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=_ROWS)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
            path.with_suffix("").with_suffix(".txt").write_text(table, encoding="utf-8")
        except OSError as error:  # no reason to end a training
            logger.warning("%s: the trace could not be written (%s)", path, error)
            return
        logger.info("profile: %s", path)


def _schedule(spec: Profile) -> Callable[[int], ProfilerAction]:
    warmup = min(1, spec.first_step - 1)
    return schedule(wait=spec.first_step - 1 - warmup, warmup=warmup, active=spec.steps, repeat=1)
