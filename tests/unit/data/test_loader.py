# SPDX-License-Identifier: Apache-2.0
"""The order of samples and reading ahead."""

import threading
from collections import Counter

import pytest

from fastvideo.data.loader import Order, Place, read_ahead


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(["one shape"] * 10, batch_size=5, seed=3)
    epochs = [[*order.batch(2 * epoch), *order.batch(2 * epoch + 1)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {place.epoch for place in epoch} == {number}
        assert Counter(place.index for place in epoch) == Counter(range(10))
    assert len({tuple(place.index for place in epoch) for epoch in epochs}) == 3


def test_a_batch_is_a_function_of_seed_and_step_only() -> None:
    def order(seed: int) -> Order:
        return Order([*"aaaaabbbbbbbbccc"], batch_size=3, seed=seed)

    forwards, backwards = order(1), order(1)
    expected = [forwards.batch(step) for step in range(50)]
    assert [backwards.batch(step) for step in reversed(range(50))] == expected[::-1]
    assert [order(2).batch(step) for step in range(50)] != expected


def test_a_batch_holds_one_shape_and_shapes_take_turns_as_often_as_they_have_samples() -> None:
    shapes = [*"a" * 30, *"b" * 10, *"c" * 7]
    order = Order(shapes, batch_size=2, seed=0)
    batches = [order.batch(step) for step in range(470)]
    found = [{shapes[place.index] for place in batch} for batch in batches]
    assert all(len(kinds) == 1 for kinds in found)
    turns = Counter(kind for kinds in found for kind in kinds)
    assert turns == {"a": 300, "b": 100, "c": 70}
    early = Counter(kind for kinds in found[:47] for kind in kinds)
    assert early == {"a": 30, "b": 10, "c": 7}, "interleaved, not one after the other"


def test_each_shape_has_each_of_its_samples_once_an_epoch() -> None:
    shapes = [*"aaaaabbb"]
    order = Order(shapes, batch_size=2, seed=0)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(400):
        seen.update((place.epoch, place.index) for place in order.batch(step))
    whole = min(max(epoch for epoch, i in seen if shapes[i] == kind) for kind in "ab")
    assert all(seen[epoch, index] == 1 for epoch in range(whole) for index in range(8))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead_keeps_the_order(threads: int) -> None:
    places = [Place(0, index) for index in range(40)]
    found = read_ahead(lambda place: place.index, places, threads=threads, ahead=8)
    assert list(found) == list(range(40))


def test_reading_ahead_is_bounded_and_stops_when_closed() -> None:
    started = 0
    lock = threading.Lock()

    def read(place: Place) -> int:
        nonlocal started
        with lock:
            started += 1
        return place.index

    found = read_ahead(read, (Place(0, i) for i in range(1000)), threads=2, ahead=8)
    for _ in range(10):
        next(found)
    found.close()
    assert started <= 10 + 8


def test_an_error_in_a_reader_reaches_the_loop() -> None:
    def read(place: Place) -> int:
        if place.index == 3:
            raise OSError("disk")
        return place.index

    found = read_ahead(read, (Place(0, i) for i in range(10)), threads=2, ahead=4)
    assert [next(found), next(found), next(found)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk"):
        next(found)
