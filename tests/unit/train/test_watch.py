# SPDX-License-Identifier: Apache-2.0
"""Faults of a run: which are told, which are counted, which end it."""

import json
import math

import pytest

from fastvideo.config.train import Watch
from fastvideo.errors import Failed
from fastvideo.train.watch import LossWatch


def watch_after(losses: list[float], spec: Watch | None = None) -> LossWatch:
    watch = LossWatch(spec or Watch())
    for step, loss in enumerate(losses, 1):
        assert watch.look(step, loss, 1.0, ["quiet.mp4"]) == []
    return watch


def test_a_spike_is_told_with_its_step_its_size_and_its_clips() -> None:
    watch = watch_after([0.1, 0.2, 0.3] * 10)
    assert watch.look(31, 0.9, 1.0, ["a.mp4"]) == []
    (warning,) = watch.look(32, 1.5, 7.25, ["a.mp4", "b.mp4"])
    for said in ("step 32", "loss 1.5", "7.5 times", "median", "0.2", "7.25", "a.mp4, b.mp4"):
        assert said in warning, said


def test_few_losses_tell_nothing() -> None:
    watch = watch_after([0.1] * 19)
    assert watch.look(20, 100.0, 1.0, []) == []
    assert watch.look(21, 100.0, 1.0, []) != []


def test_the_last_hundred_losses_count_and_a_lasting_rise_is_told_no_more() -> None:
    watch = watch_after([0.1] * 300)
    told = [watch.look(step, 1.0, 1.0, []) for step in range(301, 401)]
    assert all(told[:50])
    assert not any(told[60:])


def test_a_spike_factor_of_none_does_not_look() -> None:
    watch = watch_after([0.1] * 50, Watch(spike_factor=None))
    assert watch.look(51, 1e9, 1.0, []) == []


def test_many_clips_are_named_in_part() -> None:
    watch = watch_after([0.1] * 50)
    (warning,) = watch.look(51, 10.0, 1.0, [f"{index}.mp4" for index in range(64)])
    assert "7.mp4 and 56 more" in warning


def test_steps_left_out_are_counted_and_too_many_in_a_row_end_the_run() -> None:
    watch = LossWatch(Watch(max_skipped_steps=2))
    warning = watch.skipped(1, math.nan, 1.0, ["a.mp4"])
    assert "step 1" in warning and "nan" in warning and "a.mp4" in warning
    watch.skipped(2, 1.0, math.inf)
    watch.look(3, 1.0, 1.0, [])
    watch.skipped(4, math.nan, math.nan)
    watch.skipped(5, math.nan, math.nan)
    assert watch.skipped_steps == 4
    with pytest.raises(Failed, match=r"step 6.*a\.mp4.*3 steps in a row.*optimizer\.lr.*float32"):
        watch.skipped(6, math.nan, math.nan, ["a.mp4"])


def test_no_step_may_be_left_out_if_the_limit_is_zero() -> None:
    with pytest.raises(Failed):
        LossWatch(Watch(max_skipped_steps=0)).skipped(1, math.nan, 1.0)


def test_a_resumed_run_decides_as_if_undisturbed() -> None:
    losses = [0.1 + 0.01 * math.sin(step) for step in range(150)]
    spec = Watch(max_skipped_steps=2)
    undisturbed = watch_after(losses, spec)
    undisturbed.skipped(151, math.nan, 1.0)
    state = json.loads(json.dumps(undisturbed.state(), allow_nan=False))
    resumed = LossWatch.from_state(spec, state)
    assert len(json.dumps(state)) < 4000
    for step in (152, 153):
        for watch in (undisturbed, resumed):
            if step == 153:
                with pytest.raises(Failed):
                    watch.skipped(step, math.nan, 1.0)
            else:
                watch.skipped(step, math.nan, 1.0)
    warnings = [watch.look(154, 0.6, 1.0, ["a"]) for watch in (undisturbed, resumed)]
    assert warnings[0] == warnings[1] != []
    assert undisturbed.state() == resumed.state()


def test_starving_is_told_once_with_what_to_do() -> None:
    watch = LossWatch(Watch(starved_share=0.3))
    assert watch.starved(0.3) is None
    warning = watch.starved(0.31)
    assert warning is not None
    assert "31%" in warning and "train.loader_workers" in warning
    assert watch.starved(0.9) is None
