# SPDX-License-Identifier: Apache-2.0
"""Of everything that went wrong in a launch, what came first is told."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from fastvideo.errors import Failed, Stopped, UserError
from fastvideo.train.node.brief import LaunchDir
from fastvideo.train.node.outcome import (
    Death,
    Outcome,
    early_end,
    failed_nodes,
    first_failure,
    is_broken_by_stop,
    tell_early,
)
from fastvideo.train.node.pulse import WORDS

NOW = float(int(time.time()))


def failure(launch: LaunchDir, *told: Outcome | Death) -> UserError | Failed:
    """What is said after these processes of one node ended."""
    deaths = [dataclasses.asdict(death) for death in told if isinstance(death, Death)]
    write_ended(launch, 0, deaths=deaths, error="processes failed")
    for outcome in told:
        if isinstance(outcome, Outcome):
            outcome.write(launch)
    return first_failure(launch)


def write_ended(launch: LaunchDir, node: int, **report: Any) -> None:
    launch.root.mkdir(exist_ok=True, parents=True)
    launch.ended(node).write_text(json.dumps(report))


def died(rank: int, signal: str, *, at: float = NOW, code: int = -9) -> Death:
    return Death(rank, 100 + rank, "n1", code, signal, at, step=41)


def lost(rank: int, *, at: float) -> Outcome:
    """What a process says whose partner is gone."""
    text = "RuntimeError: Connection closed by peer"
    return Outcome(rank, "error", 41, text, f"Traceback\n{text}", host="n1", time=at)


def test_a_killed_process_counts_before_those_that_lost_it(tmp_path: Path) -> None:
    said = failure(
        LaunchDir(tmp_path),
        *(lost(0, at=NOW + 0.1), lost(2, at=NOW + 0.2)),
        *(died(0, "", code=1), died(1, "SIGKILL"), died(2, "", code=1)),
    )
    assert isinstance(said, Failed)
    assert "rank 1 (process 101 on n1) was killed by SIGKILL, most likely out of host" in str(said)
    assert "last step 41" in str(said) and str(tmp_path / "rank-1.log") in str(said)


def test_one_that_torchrun_killed_later_is_not_the_first(tmp_path: Path) -> None:
    broken = Outcome(
        1, "error", 7, "ValueError: broken", "Traceback\nValueError: broken", "n1", NOW
    )
    said = str(failure(LaunchDir(tmp_path), broken, died(0, "SIGKILL", at=NOW + 10)))
    assert "rank 1 on n1, last step 7: ValueError: broken\n  Traceback" in said


def test_the_earliest_error_is_told(tmp_path: Path) -> None:
    said = str(failure(LaunchDir(tmp_path), lost(0, at=NOW + 3), lost(3, at=NOW + 1)))
    assert said.startswith("rank 3 on n1")


def test_mistakes_in_the_input_and_known_failures_come_first(tmp_path: Path) -> None:
    mistake = Outcome(1, "user_error", 0, "shards: are gone; run preprocess", time=NOW + 1)
    said = failure(LaunchDir(tmp_path / "1"), mistake, lost(0, at=NOW), died(0, "SIGABRT"))
    assert isinstance(said, UserError) and str(said) == mistake.message
    full = Outcome(1, "failed", 40, "the disk is full", time=NOW + 1)
    said = failure(LaunchDir(tmp_path / "2"), full, lost(0, at=NOW))
    assert isinstance(said, Failed) and "the disk is full" in str(said)
    aborted = died(0, "SIGABRT")
    assert "the disk is full" in str(failure(LaunchDir(tmp_path / "2"), full, aborted))


def test_a_save_that_fails_since_a_partner_was_killed_is_told_as_that(tmp_path: Path) -> None:
    closed = Outcome(0, "failed", 41, "cannot be saved (Connection closed by peer)", time=NOW + 1)
    said = str(failure(LaunchDir(tmp_path), closed, died(1, "SIGKILL")))
    assert "rank 1 (process 101 on n1) was killed by SIGKILL" in said
    later = failure(LaunchDir(tmp_path / "2"), closed, died(1, "SIGKILL", at=NOW + 10))
    assert "cannot be saved" in str(later)


def test_a_hang_is_told_before_what_ending_it_did(tmp_path: Path) -> None:
    launch = LaunchDir(tmp_path)
    write_ended(launch, 1, deaths=[], error="RendezvousTimeoutError: nobody came")
    assert "node 1: RendezvousTimeoutError: nobody came" in str(first_failure(launch))
    assert failed_nodes(launch) == {1}
    launch.hang(0).write_text(json.dumps({"message": "rank 3 hangs", "time": NOW}))
    assert str(failure(launch, died(0, "SIGABRT"))) == "rank 3 hangs"
    assert failed_nodes(launch) == {0, 1}


def test_the_other_nodes_learn_why_one_ended_before_its_processes_began(tmp_path: Path) -> None:
    launch = LaunchDir(tmp_path / "1")
    assert early_end(launch) is None
    tell_early(launch, 1, UserError("shards: are gone"))
    tell_early(launch, 0, Failed("node 1: shards: are gone"))  # an echo
    assert failed_nodes(launch) == {1}
    told = early_end(launch)
    assert isinstance(told, UserError) and str(told) == "node 1: shards: are gone"
    launch = LaunchDir(tmp_path / "2")
    tell_early(launch, 0, Stopped("stopped by SIGTERM"))
    told = early_end(launch)
    assert isinstance(told, Stopped) and not told.by_person and failed_nodes(launch) == {0}
    launch = LaunchDir(tmp_path / "3")
    tell_early(launch, 0, Stopped("stopped by the STOP file", by_person=True))
    told = early_end(launch)
    assert isinstance(told, Stopped) and told.by_person
    write_ended(launch, 0, deaths=[], error="processes failed")
    assert early_end(launch) is None


def test_errors_after_a_stop_that_lost_no_step_are_part_of_it(tmp_path: Path) -> None:
    def broken(name: str, *told: Outcome | Death, asked_s: float = NOW) -> bool:
        failure(LaunchDir(tmp_path / name), *told)
        return is_broken_by_stop(LaunchDir(tmp_path / name), (), asked_s=asked_s, saved=40)

    assert broken("compiling", lost(0, at=NOW + 1), lost(1, at=NOW + 2), died(1, "", code=1))
    assert not broken("nothing")
    assert not broken("before", lost(0, at=NOW - 5))
    assert not broken("killed", lost(0, at=NOW + 1), died(1, "SIGKILL"))
    assert not broken("known", lost(0, at=NOW + 1), Outcome(1, "failed", 41, time=NOW + 1))
    assert not broken("steps are lost", Outcome(1, "error", 42, time=NOW + 1))


def test_words_count_where_nothing_could_be_written(tmp_path: Path) -> None:
    trace = "\n".join(f"line {number}" for number in range(10_000))
    full = Outcome(0, "failed", 40, "the disk is full" + 9000 * ".", traceback=trace)
    assert len(full.text().encode()) < WORDS
    said = first_failure(LaunchDir(tmp_path / "nowhere"), [full.text()])
    assert isinstance(said, Failed) and "the disk is full" in str(said)
    assert "line 9999" in str(said) and "line 100\n" not in str(said)
