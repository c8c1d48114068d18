# SPDX-License-Identifier: Apache-2.0
"""What processes of a job leave behind when they end, and when they ask to be queued again."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvideo.errors import STOP_SIGNALS, UserError
from fastvideo.launch.folder import PartFolder
from fastvideo.launch.word import End, Task, newest_words
from tests.words import read_words

STOPPED = End(75, "stopped by SIGUSR2", progress=7, requeue=True)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A process that has left word is deaf; this one goes on."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def leave(folder: PartFolder, end: End, *, task: int = 0, restart: int = 0, node: int = 0) -> End:
    return Task(folder, task, restart, node).run("train", lambda: end)


def test_the_variables_say_who_it_is_and_are_gone_afterwards() -> None:
    environment = {
        "FASTVIDEO_JOB_DIR": "jobs/1/train",
        "FASTVIDEO_TASK": "3",
        "FASTVIDEO_RESTART": "2",
        "FASTVIDEO_NODE_RANK": "$SLURM_PROCID",
        "SLURM_PROCID": "1",
    }
    expected = Task(PartFolder(Path("jobs/1/train")), number=3, restart=2, node=1)
    assert Task.take(environment) == expected
    assert environment.keys() == {"FASTVIDEO_NODE_RANK", "SLURM_PROCID"}
    assert Task.take(environment) is None
    assert Task.take({"FASTVIDEO_JOB_DIR": "x"}) == Task(PartFolder(Path("x")))
    for name in ("FASTVIDEO_TASK", "FASTVIDEO_RESTART", "FASTVIDEO_NODE_RANK"):
        with pytest.raises(UserError, match=f"{name}=two: is not a whole number"):
            Task.take({"FASTVIDEO_JOB_DIR": "x", name: "two"})


def test_a_verb_that_is_done_leaves_its_result(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    assert leave(folder, End(0, result={"made": 2}), task=4, restart=1).code == 0
    tree = json.loads((tmp_path / "ended/4.1.0.json").read_text())
    assert tree.keys() == {
        *("verb", "code", "message", "result", "progress", "requeue", "host", "time")
    }
    (found,) = read_words(folder)
    assert (found.task, found.restart, found.node) == (4, 1, 0)
    assert (found.verb, found.code, found.message, found.result) == ("train", 0, "", {"made": 2})
    assert found.progress is None and not found.requeue
    assert not folder.requeue(4).exists()


def test_only_a_stop_by_the_queue_asks_to_be_queued_again(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    assert leave(folder, STOPPED, task=1).code == 75
    assert folder.requeue(1).exists() and read_words(folder)[0].requeue
    assert leave(folder, End(75, "stopped by SIGINT", progress=7), task=2).code == 75
    assert leave(folder, End(2, "a mistake"), task=3).code == 2
    assert not folder.requeue(2).exists() and not folder.requeue(3).exists()


def test_a_request_of_a_start_before_is_forgotten(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    leave(folder, STOPPED)
    seen = []

    def action() -> End:
        seen.append(folder.requeue(0).exists())
        return End(0)

    Task(folder, node=1, restart=1).run("train", action)
    Task(folder, restart=1).run("train", action)
    assert seen == [True, False], "only the first node takes it away"


def test_other_nodes_hide_a_stop_and_ask_for_nothing(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    end = leave(folder, STOPPED, node=1)
    assert (end.code, end.message) == (0, "stopped by SIGUSR2")
    (found,) = read_words(folder)
    assert (found.node, found.code, found.requeue) == (1, 75, False)
    assert not folder.requeue(0).exists()
    assert leave(folder, End(1, "broken"), node=1).code == 1


def test_what_nobody_expected_is_told_and_goes_on(tmp_path: Path) -> None:
    def action() -> End:
        error = RuntimeError("out of memory")
        error.add_note("shard 3, clip 'x.mp4'")
        raise error

    with pytest.raises(RuntimeError, match="out of memory"):
        Task(PartFolder(tmp_path)).run("preprocess", action)
    (found,) = read_words(PartFolder(tmp_path))
    assert found.code == 1
    assert found.message == "shard 3, clip 'x.mp4': RuntimeError: out of memory"


def test_restarts_that_gain_nothing_are_not_asked_for_for_ever(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    for restart in range(3):
        leave(folder, STOPPED, restart=restart)
        assert folder.requeue(0).exists(), restart
    end = leave(folder, STOPPED, restart=3)
    assert end.code == 75 and not folder.requeue(0).exists()
    for words in ("stopped by SIGUSR2", "3 restarts in a row gained nothing", "time_minutes"):
        assert words in end.message
    assert "every_minutes" in end.message
    assert newest_words(folder, [0]).get(0).message == end.message  # type: ignore[union-attr]


def test_progress_and_ends_without_a_word_begin_the_count_anew(tmp_path: Path) -> None:
    moved, lost = PartFolder(tmp_path / "moved"), PartFolder(tmp_path / "lost")
    for restart, progress in enumerate((5, 7, 7, 7)):
        leave(moved, End(75, "", progress=progress, requeue=True), restart=restart)
    assert moved.requeue(0).exists()
    for restart in (0, 1, 3, 4):  # the node was lost in the third start
        leave(lost, STOPPED, restart=restart)
    assert lost.requeue(0).exists()


def test_half_a_word_and_other_files_are_passed_over(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    assert read_words(folder) == []
    leave(folder, STOPPED, task=10, restart=2)
    text = folder.word(10, 2, 0).read_text()
    folder.word(11, 0, 0).write_text(text[:40])
    folder.word(12, 0, 0).write_text("{}")
    (folder.ended / "10.3.json").write_text(text)
    folder.word(9, 0, 0).write_text(text)
    assert [found.task for found in read_words(folder)] == [9, 10]


def test_the_newest_word_is_of_the_last_start_and_of_its_first_node(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path)
    for restart, node in ((0, 0), (1, 2), (1, 1), (0, 1)):
        leave(folder, STOPPED, restart=restart, node=node)
    newest = newest_words(folder, [0]).get(0)
    assert newest is not None and (newest.restart, newest.node) == (1, 1)
    assert newest_words(folder, [1]).get(1) is None


def test_a_folder_that_cannot_be_written_does_not_change_the_end(tmp_path: Path) -> None:
    (tmp_path / "part").write_text("a file")
    assert leave(PartFolder(tmp_path / "part"), STOPPED) == STOPPED
