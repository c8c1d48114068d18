# SPDX-License-Identifier: Apache-2.0
"""Shards to samples: an index from the markers, a seeded order, reads ahead of the loop.

Axes: C channels, T/Y/X latent frames, rows, columns, L text tokens, D text dimension.
"""

import collections
import concurrent.futures
import json
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastvideo import hashing, state
from fastvideo.data.shard import StoredTensor, read_texts, stored_tensor
from fastvideo.models.family import Text
from fastvideo.state import ShardStore

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One clip as stored: raw latent (C, T, Y, X), each caption, and what its first frame became.

    ``images`` holds ``first_frame_latent`` (C, T, Y, X) and ``clip_feature`` (N, D), as the model
    needs them.
    """

    id: str
    vae_latent: Tensor
    texts: tuple[Text, ...]
    images: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Entry:
    path: Path
    row: Mapping[str, Any]
    latent: StoredTensor
    images: Mapping[str, StoredTensor]


IMAGE_COLUMNS = ("clip_feature", "first_frame_latent")


class Samples:
    """Random access to the clips of one split, in the order of shards and rows."""

    def __init__(
        self, store: ShardStore, *, split: Literal["train", "heldout"], columns: Collection[str]
    ) -> None:
        """Index the complete shards of the plan; no Parquet footer is read.

        ``columns`` are the tensors that a sample is made of, which the shards must hold.

        Raises:
            UserError: No plan, or shards that are missing.
        """
        plan = state.complete_plan(store)
        splits = dict(_splits(store))
        images = [name for name in IMAGE_COLUMNS if name in columns]
        self._entries = [
            _entry(store.shard(index), row, images)
            for index in state.shard_indices(plan)
            for row in _rows(store, plan, index)
            if splits[row["id"]] == split
        ]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._entries)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape (C, T, Y, X) of the latent of each clip."""
        return [tuple(entry.latent.shape) for entry in self._entries]

    def id(self, index: int) -> str:
        """Name of a clip."""
        name: str = self._entries[index].row["id"]
        return name

    def __getitem__(self, index: int) -> Sample:
        """Read one clip from disk."""
        entry = self._entries[index]
        images = {name: stored.read() for name, stored in entry.images.items()}
        texts = read_texts(entry.path, entry.row)
        return Sample(entry.row["id"], entry.latent.read(), texts, images)


def _splits(store: ShardStore) -> Iterator[tuple[str, str]]:
    with open(store.clips, encoding="utf-8") as lines:
        for line in lines:
            clip = json.loads(line)
            if clip["state"] == "accepted":
                yield clip["id"], clip["split"]


def _rows(store: ShardStore, plan: dict[str, Any], index: int) -> list[dict[str, Any]]:
    marker = state.read_marker(
        store.shard(index), fingerprint=plan["shards"][str(index)]["fingerprint"]
    )
    assert marker is not None  # complete_plan has seen it
    rows: list[dict[str, Any]] = marker["rows"]
    return rows


def _entry(path: Path, row: dict[str, Any], images: Sequence[str]) -> _Entry:
    found = {name: stored_tensor(path, row, name) for name in ("vae_latent", *images)}
    places = {name: stored for name, stored in found.items() if stored is not None}
    assert len(places) == len(found), f"{path}: a row lacks what its settings promise"
    return _Entry(path, row, places.pop("vae_latent"), places)


@dataclass(frozen=True)
class Place:
    """Which sample stands at a position of the endless order."""

    epoch: int
    index: int


class Order:
    """The samples of each step, a function of (seed, step): the state is how far a run has come.

    Samples of one shape form a bucket with a permutation of its own for each of its epochs. All
    samples of a step are of one bucket, and buckets take turns as their sizes say.
    """

    def __init__(self, shapes: Sequence[Hashable], *, batch_size: int, seed: int) -> None:
        """Order samples, whose shapes are given, in batches of ``batch_size``."""
        members: dict[Hashable, list[int]] = {}
        for index, shape in enumerate(shapes):
            members.setdefault(shape, []).append(index)
        self._buckets = [_Bucket(indices, seed=seed) for indices in members.values()]
        self._batch_size, self._num_samples = batch_size, len(shapes)
        self._turns: list[tuple[int, int]] = []
        self._taken = [0] * len(self._buckets)

    def batch(self, step: int) -> list[Place]:
        """The samples of a step, counted from 0."""
        while len(self._turns) <= step:
            self._turns.append(self._next_turn())
        number, turn = self._turns[step]
        first = turn * self._batch_size
        bucket = self._buckets[number]
        return [bucket.place(position) for position in range(first, first + self._batch_size)]

    def _next_turn(self) -> tuple[int, int]:
        """The bucket that lags most behind its share, and how many batches it gave before."""
        steps = len(self._turns) + 1
        lags = [
            len(bucket) * steps - taken * self._num_samples
            for bucket, taken in zip(self._buckets, self._taken, strict=True)
        ]
        number = lags.index(max(lags))
        self._taken[number] += 1
        return number, self._taken[number] - 1


class _Bucket:
    """Samples of one shape in an endless order."""

    def __init__(self, indices: list[int], *, seed: int) -> None:
        self._indices, self._seed = indices, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def place(self, position: int) -> Place:
        epoch, within = divmod(position, len(self._indices))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hashing.seed_of(self._seed, "order", epoch))
            self._permutation = torch.randperm(len(self._indices), generator=generator)
            self._epoch = epoch
        return Place(epoch, self._indices[int(self._permutation[within])])


def read_ahead(
    read: Callable[[Place], T], places: Iterable[Place], *, threads: int, ahead: int
) -> Generator[T]:
    """Yield ``read(place)`` in order while ``threads`` work up to ``ahead`` places further on.

    Threads suit this work: reading, checksums and random numbers all release the interpreter.
    """
    if threads == 0:
        yield from map(read, places)
        return
    upcoming = iter(places)
    pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="loader")
    try:
        while True:
            while len(pending) < ahead and (place := next(upcoming, None)) is not None:
                pending.append(pool.submit(read, place))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
