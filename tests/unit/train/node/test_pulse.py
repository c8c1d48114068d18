# SPDX-License-Identifier: Apache-2.0
"""Beats reach the parent, and of processes that hang the right one is named."""

import os
import signal
import subprocess
import sys
import time

from fastvideo.train.node.pulse import (
    START,
    START_MINUTES,
    Beat,
    Patience,
    Pulse,
    Pulses,
    Standstill,
    Watched,
    describe_hang,
)
from tests.tiny_world import start_fork, wait_for


def beat(rank: int, step: int, phase: str, since_s: float, pid: int = 0) -> Beat:
    return Beat(rank, pid or os.getpid(), step, phase, since_s)


def named(*beats: Beat) -> str:
    return describe_hang({beat.rank: beat for beat in beats}, minutes=30)


def test_the_parent_reads_the_last_beat_of_each_process() -> None:
    with Pulses(3) as pulses:
        assert pulses.read() == {}

        def child() -> None:
            pulse = Pulse(pulses.path, rank=7, local_rank=2)
            pulse.beat(41, "data")
            pulse.beat(42, "backward")
            pulse.tell("done: " + 20000 * "ü")

        before_s = time.monotonic()
        assert wait_for(start_fork(child, environment={})) == 0
        (found,) = pulses.read().values()
        assert (found.rank, found.step, found.phase) == (7, 42, "backward")
        (words,) = pulses.words()
        assert words.startswith("done: üü") and len(words) > 8000, "as much as there is room for"
        assert before_s < found.since_s < time.monotonic() and found.pid != os.getpid()


def test_the_one_in_a_lower_step_hangs() -> None:
    said = named(beat(0, 41, "data", 5), beat(1, 41, "data", 6), beat(2, 40, "save", 9))
    assert said.startswith("rank 2 (process") and "hangs in 'save' of step 40 for 30 min" in said
    assert said.endswith("; ranks 0, 1 wait in 'data' of step 41")


def test_in_one_step_those_in_the_phase_entered_first_hang() -> None:
    said = named(beat(0, 41, "backward", 5), beat(3, 41, "data", 4), beat(1, 41, "backward", 6))
    assert said.startswith("rank 3 ") and "; ranks 0, 1 wait in 'backward'" in said
    both = named(beat(0, 41, "backward", 5), beat(1, 41, "backward", 4))
    assert "rank 0 (" in both and " and rank 1 (" in both and "hang in 'backward'" in both


def test_a_process_that_a_signal_stopped_hangs_wherever_it_is() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        os.kill(sleeper.pid, signal.SIGSTOP)
        os.waitpid(sleeper.pid, os.WUNTRACED)
        said = named(beat(0, 41, "data", 4), beat(1, 41, "backward", 6, pid=sleeper.pid))
        assert said.startswith(f"rank 1 (process {sleeper.pid} ") and "rank 0 waits" in said
    finally:
        sleeper.kill()
        sleeper.wait()


def test_time_in_which_nobody_looked_is_no_standstill() -> None:
    still = Standstill(every_s=0.01)
    still._longest_s = 0.02  # the second that a busy machine gets is long for a test
    assert still.look({0: "a", 1: "b"}) == 0
    time.sleep(0.3)
    assert still.look({0: "a", 1: "c"}) < 0.1, "somebody stopped us, too"
    for _ in range(10):
        time.sleep(0.015)
        longest_s = still.look({0: "a", 1: time.monotonic()})
    assert 0.1 < longest_s < 0.3
    assert still.look({0: "x"}) == 0


def test_a_start_lasts_until_the_second_step_and_a_save_may_take_longer() -> None:
    patience = Patience(1)

    def minutes(*beats: Beat) -> float:
        return patience.minutes({beat.rank: beat for beat in beats})

    assert minutes() == START_MINUTES
    assert minutes(beat(0, 0, START, 1), beat(1, 0, START, 1)) == START_MINUTES
    assert minutes(beat(0, 40, "heldout", 2), beat(1, 0, START, 1)) == START_MINUTES
    assert minutes(beat(0, 40, "open", 2), beat(1, 40, "sampling", 2)) == START_MINUTES
    assert minutes(beat(0, 41, "forward", 3), beat(1, 41, "data", 3)) == START_MINUTES, "compiles"
    assert minutes(beat(0, 42, "data", 4), beat(1, 41, "backward", 4)) == START_MINUTES
    assert minutes(beat(0, 42, "data", 4), beat(1, 42, "data", 5)) == 1
    assert minutes(beat(0, 42, "data", 4), beat(1, 42, "save", 5)) == 4
    assert minutes(beat(0, 42, "sampling", 4), beat(1, 42, "open", 5)) == 4
    assert minutes(beat(0, 42, "sampling", 6), beat(1, 42, "sampling", 6)) == 1
    assert minutes(beat(0, 42, "heldout", 6), beat(1, 42, "heldout", 6)) == 1
    assert Patience(30).minutes({}) == 30


def test_a_process_alone_that_hangs_ends_with_its_step_and_stack() -> None:
    reader, writer = os.pipe()

    def hang() -> None:
        from fastvideo import log

        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w")
        log.setup()
        with Watched(hang_minutes=0.5 / 60) as pulse:
            for step in range(10):  # as long as it gets on nothing happens
                pulse.beat(step, "data")
                time.sleep(0.1)
            pulse.beat(41, "backward")  # not the first step, which may take long
            time.sleep(30)

    code = wait_for(start_fork(hang, environment={}))
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    assert code == 1
    assert "hangs in 'backward' of step 41" in text and "in hang" in text
