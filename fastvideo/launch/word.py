# SPDX-License-Identifier: Apache-2.0
"""What a process of a job says of its end, and the request to be queued again."""

import contextlib
import dataclasses
import re
import signal
import socket
import time
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fastvideo import atomic
from fastvideo.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_UNEXPECTED,
    STOP_SIGNALS,
    UserError,
    describe,
)
from fastvideo.launch.folder import PartFolder
from fastvideo.log import logger
from fastvideo.train.node.nodes import read_rank

JOB_DIR, TASK, RESTART = "FASTVIDEO_JOB_DIR", "FASTVIDEO_TASK", "FASTVIDEO_RESTART"
IN_VAIN = 3
"""Restarts in a row that gain nothing; after them a task is not queued again."""
REMEDIES = {
    "preprocess": "make shards smaller (shards.rows)",
    "train": "save more often (train.checkpoint.every_steps, every_minutes)",
}


@dataclass(frozen=True)
class End:
    """How a verb ended."""

    code: int
    """Exit code."""
    message: str = ""
    """Why it did not end well; empty if it did."""
    result: Any = None
    """What ``--json`` prints."""
    progress: int | None = None
    """Differs between two stops if work was done in between."""
    requeue: bool = False
    """Whether a queue stopped it, with the state saved."""


@dataclass(frozen=True)
class Word:
    """What one process said of its end."""

    task: int
    restart: int
    node: int
    verb: str
    code: int
    message: str
    result: Any
    progress: int | None
    requeue: bool
    """Whether it asked to be queued again."""
    host: str
    time: float
    """Seconds of the Unix epoch."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read one; None if it is missing or no word."""
        place, tree = _PLACE.fullmatch(path.name), atomic.read_json(path)
        if place is None or not isinstance(tree, dict) or not tree.keys() >= _SAID:
            return None
        task, restart, node = map(int, place.groups())
        return cls(task, restart, node, **{name: tree[name] for name in _SAID})


_PLACE = re.compile(r"(\d+)\.(\d+)\.(\d+)\.json")
_SAID = {field.name for field in dataclasses.fields(Word)} - {"task", "restart", "node"}


def newest_words(folder: PartFolder, tasks: Collection[int]) -> dict[int, Word]:
    """The words of the last starts of some tasks that left one; of several nodes that of the first.

    No other file is read.
    """
    newest: dict[int, tuple[int, int]] = {}
    wanted = frozenset(tasks)
    for path in folder.ended.glob("*.json"):
        if place := _PLACE.fullmatch(path.name):
            task, restart, node = map(int, place.groups())
            if task in wanted:
                newest[task] = max(newest.get(task, (-1, 0)), (restart, -node))
    read = {t: Word.read(folder.word(t, restart, -node)) for t, (restart, node) in newest.items()}
    return {task: word for task, word in read.items() if word is not None}


@dataclass(frozen=True)
class Task:
    """A process of a job."""

    folder: PartFolder
    number: int = 0
    restart: int = 0
    node: int = 0

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Take out of the environment which one this is; None outside of a job.

        Processes that it starts do not find it there, and leave no word in its place.

        Raises:
            UserError: A variable does not hold a number.
        """
        folder = environment.pop(JOB_DIR, "")
        task, restart = environment.pop(TASK, ""), environment.pop(RESTART, "")
        if not folder:
            return None
        node = read_rank(environment)
        return cls(PartFolder(Path(folder)), _number(TASK, task), _number(RESTART, restart), node)

    def run(self, verb: str, action: Callable[[], End]) -> End:
        """Run a verb and leave word of its end, also of an exception, which goes on.

        Returns:
            The end as the process is to show it. A node that is not the first hides a stop: its
            exit code would have the first one killed before it has left its own word.
        """
        self._forget_request()
        try:
            end = action()
        except Exception as error:  # goes on
            self._leave(verb, End(EXIT_UNEXPECTED, describe(error)))
            raise
        end = self._leave(verb, end)
        hidden = self.node > 0 and end.code == EXIT_STOPPED
        return dataclasses.replace(end, code=EXIT_DONE) if hidden else end

    def _forget_request(self) -> None:
        """Of a start that was killed after it asked to be queued again."""
        if self.node == 0:
            with contextlib.suppress(OSError):  # no word can be written there either
                self.folder.requeue(self.number).unlink(missing_ok=True)

    def _leave(self, verb: str, end: End) -> End:
        for number in STOP_SIGNALS:  # all is saved; another request to stop has nothing to add
            signal.signal(number, signal.SIG_IGN)
        if self.node > 0:
            end = dataclasses.replace(end, requeue=False)
        about = {"verb": verb, "host": socket.gethostname(), "time": time.time()}
        place = self.folder.word(self.number, self.restart, self.node)
        try:
            if end.requeue and self._is_in_vain(end):
                end = _given_up(verb, end)
            atomic.write_json(place, {**dataclasses.asdict(end), **about}, point="word")
            if end.requeue:
                atomic.write_bytes(self.folder.requeue(self.number), b"", point="requeue")
        except OSError as error:  # a full disk, say; how the verb ended counts more
            logger.warning("%s: cannot be written (%s)", place, error.strerror)
        return end

    def _is_in_vain(self, end: End) -> bool:
        """Whether it was stopped by a queue as often as is allowed without having done a thing."""
        starts = range(self.restart - IN_VAIN, self.restart)
        words = [Word.read(self.folder.word(self.number, start, 0)) for start in starts]
        return all(word and word.requeue and word.progress == end.progress for word in words)


def _given_up(verb: str, end: End) -> End:
    remedy = f", or {REMEDIES[verb]}" if verb in REMEDIES else ""
    reason = (
        f"not queued again, since {IN_VAIN} restarts in a row gained nothing; raise time_minutes "
        f"of the cluster{remedy}, and submit again"
    )
    return dataclasses.replace(end, message=f"{end.message}; {reason}", requeue=False)


def _number(name: str, text: str) -> int:
    if text and not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text}: is not a whole number from 0")
    return int(text or "0")
