# SPDX-License-Identifier: Apache-2.0
"""How often a training was started from one step, so that a crash loop ends by itself."""

import time

from fastvideo import atomic
from fastvideo.errors import UserError
from fastvideo.state import TrainDir

LIMIT = 3


def count(directory: TrainDir, *, force: bool) -> None:
    """Note that training starts from the newest checkpoint.

    A start counts however it ends, unless ``forget`` takes it back: a job whose time limit ends it
    before the first new checkpoint would go on for ever too.

    Args:
        directory: Where it trains.
        force: Count from 1 again.

    Raises:
        UserError: ``LIMIT`` starts from this step saved no further one.
    """
    step = _step(directory)
    times = [] if force else _times(directory, step)
    if len(times) >= LIMIT:
        raise UserError(
            f"{directory.root}: {len(times)} starts from step {step} ({', '.join(times)}) saved no "
            f"further step, so another one is not tried. Find out why ({directory.launches} keeps "
            "the logs of several processes), or save more often (train.checkpoint.every_steps, "
            f"every_minutes); then start with --force, or remove {directory.attempts}"
        )
    _write(directory, step, [*times, time.strftime("%Y-%m-%d %H:%M:%S")])


def forget(directory: TrainDir) -> None:
    """Take the last start back: a person ended it, or the input has to change first."""
    found = atomic.read_json(directory.attempts)
    if isinstance(found, dict) and found.get("times"):
        _write(directory, found["step"], found["times"][:-1])


def _write(directory: TrainDir, step: int, times: list[str]) -> None:
    value = {"step": step, "starts": len(times), "times": times}
    atomic.write_json(directory.attempts, value, point="attempts")


def _step(directory: TrainDir) -> int:
    return max(directory.complete_checkpoints(), default=0)


def _times(directory: TrainDir, step: int) -> list[str]:
    found = atomic.read_json(directory.attempts)
    if not isinstance(found, dict) or found.get("step") != step:
        return []
    return [str(moment) for moment in found.get("times", ())]
