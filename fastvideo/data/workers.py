# SPDX-License-Identifier: Apache-2.0
"""Worker processes that run ahead of their reader, in order and with bounded memory."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from fastvideo.data.decode import die_with_parent

STOP_S = 1.0
"""How much later than others a process may get a signal that was sent to all."""

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    function: Callable[[T], R], items: Iterable[T], *, processes: int, name: Callable[[T], str]
) -> Generator[R]:
    """Yield ``function(item)`` for each item, in order.

    At most ``2 * processes`` items and results are in memory at a time: ``items`` is read no
    further than that.

    Args:
        function: Can be pickled, as items and results can.
        items: What to work on.
        processes: How many run it; 0 runs it here, one item at a time.
        name: Of an item, for the message if a process dies.

    Raises:
        RuntimeError: A process died.
    """
    if processes == 0:
        yield from map(function, items)
        return
    # spawn: a forked child of a process that uses threads or CUDA may hang
    pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=die_with_parent,
    )
    upcoming = iter(items)
    pending: collections.deque[tuple[str, concurrent.futures.Future[R]]] = collections.deque()
    try:
        while True:
            for item in itertools.islice(upcoming, 2 * processes - len(pending)):
                pending.append((name(item), pool.submit(function, item)))
            if not pending:
                return
            suspects = [suspect for suspect, _ in pending][:processes]
            yield _result(pending.popleft()[1], suspects=suspects)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: concurrent.futures.Future[R], *, suspects: Sequence[str]) -> R:
    try:
        return future.result()
    except concurrent.futures.BrokenExecutor as error:
        # A request to stop may have reached all processes, and them first.
        time.sleep(STOP_S)
        raise RuntimeError(
            "a decoding process died, of a crash or for lack of memory, on one of: "
            + ", ".join(suspects)
        ) from error
