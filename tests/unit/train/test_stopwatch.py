# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes; the GPU's part is in tests/gpu."""

import pytest

from fastvideo.train.stopwatch import Stopwatch


class Clock:
    """Shows what it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_times_of_a_phase_add_up_until_they_are_taken() -> None:
    clock = Clock()
    watch = Stopwatch("cpu", clock)
    for wait_s, compute_s in [(0.5, 2.0), (0.25, 4.0)]:
        with watch.phase("data"):
            clock.now_s += wait_s
        clock.now_s += 64.0  # between phases
        with watch.phase("forward"):
            clock.now_s += compute_s
    assert watch.take() == {"data": 0.75, "forward": 6.0}
    assert watch.take() == {}
    with watch.phase("save"):
        clock.now_s += 8.0
    assert watch.take() == {"save": 8.0}


def test_a_phase_that_fails_counts() -> None:
    clock = Clock()
    watch = Stopwatch("cpu", clock)
    with pytest.raises(ZeroDivisionError), watch.phase("backward"):
        clock.now_s += 1.0
        raise ZeroDivisionError
    assert watch.take() == {"backward": 1.0}
