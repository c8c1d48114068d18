# SPDX-License-Identifier: Apache-2.0
"""Worker processes that run ahead: order, bounded reading, and a process that dies."""

import os
from collections.abc import Iterator

import pytest

from fastvideo.data.workers import in_order


def counted(count: int, taken: list[int]) -> Iterator[int]:
    for item in range(count):
        taken.append(item)
        yield -item


@pytest.mark.parametrize("processes", [0, 2])
def test_results_come_in_order_and_items_are_read_no_further_than_needed(processes: int) -> None:
    taken: list[int] = []
    results = in_order(abs, counted(20, taken), processes=processes, name=str)
    for expected in range(20):
        assert next(results) == expected
        assert len(taken) <= expected + max(1, 2 * processes)
    assert next(results, None) is None


def test_what_a_dying_process_worked_on_is_named() -> None:
    results = in_order(os._exit, [3], processes=1, name=lambda item: f"item {item}")
    with pytest.raises(RuntimeError, match=r"a decoding process died, .* on one of: item 3"):
        list(results)
