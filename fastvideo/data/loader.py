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
    """A permutation per epoch, a function of (seed, epoch); the state is one global position."""

    def __init__(self, num_samples: int, *, seed: int) -> None:
        """Order ``num_samples`` samples."""
        self._num_samples, self._seed = num_samples, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> Place:
        """Place of the sample at a global position, counted from 0 over all epochs."""
        epoch, within = divmod(position, self._num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(hashing.seed_of(self._seed, "order", epoch))
            self._permutation = torch.randperm(self._num_samples, generator=generator)
            self._epoch = epoch
        return Place(epoch, int(self._permutation[within]))


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
