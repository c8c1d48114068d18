# SPDX-License-Identifier: Apache-2.0
"""The order of samples and reading ahead."""

import threading
from collections import Counter

import pytest

from fastvideo.data.loader import Order, Place, read_ahead


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(10, seed=3)
    epochs = [[order[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {place.epoch for place in epoch} == {number}
        assert Counter(place.index for place in epoch) == Counter(range(10))
    assert len({tuple(place.index for place in epoch) for epoch in epochs}) == 3


def test_a_place_is_a_function_of_seed_and_position_only() -> None:
    forwards, backwards = Order(7, seed=1), Order(7, seed=1)
    positions = list(range(50))
    expected = [forwards[position] for position in positions]
    assert [backwards[position] for position in reversed(positions)] == expected[::-1]
    assert [Order(7, seed=2)[position] for position in positions] != expected


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
