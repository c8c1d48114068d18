# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a pure function of the step, so that there is no state to resume."""

import math

from fastvideo.config.train import Schedule


def learning_rate_factor(step: int, schedule: Schedule, *, steps: int) -> float:
    """Share of the peak learning rate at ``step`` (from 0) of ``steps``."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    fall = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * fall
