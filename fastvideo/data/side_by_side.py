# SPDX-License-Identifier: Apache-2.0
"""Parts of one work in processes side by side, that end with their parent or with the first fault.

Free of torch, which each process imports once it knows its GPU.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from fastvideo import log
from fastvideo.data.decode import die_with_parent
from fastvideo.data.workers import STOP_S
from fastvideo.errors import STOP_SIGNALS, Failed, UserError, describe


def side_by_side(work: Sequence[Callable[[], None]], *, gpus: Sequence[str]) -> None:
    """Run each in a process of its own, with one of ``gpus`` if there are some.

    Args:
        work: Can be pickled; what is complete on disk stays when it is killed.
        gpus: As ``CUDA_VISIBLE_DEVICES`` names them; more processes than GPUs share them.

    Raises:
        UserError: As the first to fail says.
        Failed: As the first to fail says, or it was killed.
    """
    parts: dict[Connection, SpawnProcess] = {}
    try:
        for number, action in enumerate(work):
            place = _Place(number, len(work), gpus[number % len(gpus)] if gpus else None)
            _start(action, place, parts)
        running = dict(parts)
        while running:
            for told in wait(list(running)):
                assert isinstance(told, Connection)
                if error := _error(told, running.pop(told)):
                    time.sleep(STOP_S)  # a stop that reached all of us counts more
                    raise error
    finally:
        for process in parts.values():
            process.kill()
        for process in parts.values():
            process.join()


@dataclass(frozen=True)
class _Place:
    """One among the processes."""

    number: int
    count: int
    gpu: str | None

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.count}"


def _start(
    action: Callable[[], None], place: _Place, parts: dict[Connection, SpawnProcess]
) -> None:
    # spawn: a forked child of a process that uses threads or CUDA may hang
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(action, place, tell), name=str(place))
    with _held_back():
        process.start()
        parts[told] = process
    tell.close()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Keep signals from a child until it has decided what to do with them, and from us as long."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(action: Callable[[], None], place: _Place, tell: Connection) -> None:
    """Do one part, and tell the error if there is one."""
    die_with_parent()
    # Not ignored, which processes started from here would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // place.count)))
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    log.setup(part=str(place))
    tell.send(_tried(action))


def _tried(action: Callable[[], None]) -> bytes:
    """The error, pickled; of one whose class may not bear that, the text."""
    try:
        action()
    except (UserError, Failed) as error:
        return pickle.dumps(error)
    except Exception as error:  # told to the parent
        if isinstance(error, OSError) and type(error).__module__ == "builtins":
            return pickle.dumps(error)  # most of them are about paths of the recipe
        traceback.print_exc()
        return pickle.dumps(Failed(describe(error)))
    return b""


def _error(told: Connection, process: SpawnProcess) -> Exception | None:
    """How a process ended that has told it or is gone."""
    try:
        message: bytes = told.recv()
    except EOFError:
        process.join()
        return Failed(f"process {process.name} of those that fill shards {_death(process)}")
    if not message:
        return None
    error: Exception = pickle.loads(message)
    return error


def _death(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"ended with exit code {code}, see what it said"
    likely = ", most likely out of host memory" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{likely}"
