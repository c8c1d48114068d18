# SPDX-License-Identifier: Apache-2.0
"""When the node's parent gives up waiting."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvideo.errors import Failed
from fastvideo.train.node import pulse
from fastvideo.train.node.brief import LaunchDir
from fastvideo.train.node.nodes import Nodes
from fastvideo.train.node.outcome import Outcome, first_failure, tell_early
from fastvideo.train.node.parent import _await_rank_0, _Watch
from fastvideo.train.node.pulse import ENDED, Pulse, Pulses


def watched_s(watch: _Watch) -> float:
    """How long it lasts until it is over."""
    begin_s = time.monotonic()
    while not watch.is_over():
        assert time.monotonic() - begin_s < 10
        time.sleep(0.02)
    return time.monotonic() - begin_s


def test_a_start_without_a_sign_of_life_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "START_MINUTES", 0.3 / 60)
    with Pulses(1) as pulses:
        assert 0.2 < watched_s(_Watch(LaunchDir(tmp_path), Nodes(), pulses, hang_minutes=1e-3)) < 5
    told = str(first_failure(LaunchDir(tmp_path)))
    assert "no process of this node began within 0.005 min" in told and "node-0.log" in told


def test_a_launch_that_does_not_end_after_its_processes_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "START_MINUTES", 0.3 / 60)
    with Pulses(1) as pulses:
        Pulse(pulses.path, rank=0, local_rank=0).beat(60, ENDED)
        assert 0.2 < watched_s(_Watch(LaunchDir(tmp_path), Nodes(), pulses, hang_minutes=1e-3)) < 5
    assert list(tmp_path.iterdir()) == [], "what the processes said counts"


def test_nodes_that_wait_end_with_one_that_does_not_come(tmp_path: Path) -> None:
    launch = LaunchDir(tmp_path)
    tell_early(launch, 1, Failed("has no GPU"))
    with Pulses(1) as pulses:
        watch = _Watch(launch, Nodes(count=2), pulses, hang_minutes=30)
        assert watched_s(watch) < 1


def test_other_nodes_leave_after_rank_0(tmp_path: Path) -> None:
    launch = LaunchDir(tmp_path)

    def waited_s(then: Callable[[], None]) -> float:
        begin_s = time.monotonic()
        other = threading.Timer(1.0, then)
        other.start()
        _await_rank_0(launch, minutes=1.0)
        other.join()
        return time.monotonic() - begin_s

    assert 1 <= waited_s(lambda: Outcome(0, "stopped", 7).write(launch)) < 5
    launch.outcome(0).unlink()
    assert 1 <= waited_s(lambda: tell_early(launch, 0, Failed("has no GPU"))) < 5
    launch.ended(0).unlink()
    begin_s = time.monotonic()
    _await_rank_0(launch, minutes=1 / 60)
    assert 1 <= time.monotonic() - begin_s < 5, "not for ever"
