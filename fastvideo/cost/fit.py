# SPDX-License-Identifier: Apache-2.0
"""Which setting of a recipe fits into a GPU's memory, with as few changes as can be."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.cost.layout import divisors, problems
from fastvideo.cost.memory import GIB, Memory, memory, micro_batch

POLICIES = ("none", "selective", "full")
"""Of activation checkpointing, the fastest first."""


@dataclass(frozen=True)
class Setting:
    """Keys of a recipe that decide what a GPU holds, and what that is."""

    replicate: int
    shard: int
    changes: Mapping[str, str | int | bool]
    memory: Memory

    @property
    def overrides(self) -> str:
        """What to write on the command line."""
        keys = {"parallel.replicate": self.replicate, "parallel.shard": self.shard}
        values = {**keys, **self.changes}
        return " ".join(f"{key}={_plain(value)}" for key, value in values.items())


def nearest_fit(
    recipe: Recipe,
    config: Mapping[str, Any],
    *,
    processes: int,
    memory_gib: float,
    host_gib: float | None = None,
    offload: bool = True,
) -> Setting | None:
    """Find a setting that fits; None if none does with this number of processes.

    Fewest changed keys first, of those the fastest: weights in host memory last, whole copies
    before sharded ones, samples on one process before shared ones, and nothing computed again
    before attention kept before all computed again. In host memory those spread the most come
    first: they take the least of it.

    Args:
        recipe: What is trained.
        config: The transformer's config.json.
        processes: All processes of all nodes.
        memory_gib: Of one GPU.
        host_gib: Host memory for each process; None where it is not known.
        offload: Whether weights may move to the host.
    """
    candidates = _candidates(recipe, config, processes, limited=host_gib is not None)
    for candidate in sorted(candidates, key=_order):
        if candidate.offload and not (offload or recipe.parallel.cpu_offload):
            continue
        changed = _changed(recipe, candidate)
        if problems(changed, config, processes=processes):
            continue
        needed = memory(changed, config, processes=processes, shard=candidate.shard)
        fits_host = host_gib is None or needed.host <= host_gib * GIB
        if needed.peak <= memory_gib * GIB and fits_host:
            changes = dict(candidate.changes)
            return Setting(processes // candidate.shard, candidate.shard, changes, needed)
    return None


@dataclass(frozen=True)
class _Candidate:
    shard: int
    sequence: int
    policy: str
    offload: bool
    micro: int
    asynchronous: bool
    changes: tuple[tuple[str, str | int | bool], ...]
    """Keys beside ``parallel.replicate`` and ``parallel.shard`` that differ from the recipe's."""
    moved: bool
    """Whether those two do."""


def _candidates(
    recipe: Recipe, config: Mapping[str, Any], processes: int, *, limited: bool
) -> Iterator[_Candidate]:
    """All settings; ``limited`` is host memory."""
    parallel, train = recipe.parallel, recipe.train
    sequences = divisors(math.gcd(processes, int(config["num_attention_heads"])))
    micros = sorted({micro_batch(recipe, processes=processes), 1}, reverse=True)
    asynchronous = train.checkpoint.asynchronous
    copies = {asynchronous, False} if limited else {asynchronous}
    for shard, sequence, policy, offload, micro, copied in itertools.product(
        divisors(processes), sequences, POLICIES, (False, True), micros, copies
    ):
        pairs: dict[str, tuple[str | int | bool, str | int | bool]] = {
            "parallel.sequence": (sequence, parallel.sequence),
            "train.activation_checkpointing": (policy, train.activation_checkpointing),
            "parallel.cpu_offload": (offload, parallel.cpu_offload),
            "train.micro_batch_size": (micro, micro_batch(recipe, processes=processes)),
            "train.checkpoint.asynchronous": (copied, asynchronous),
        }
        changes = tuple((key, new) for key, (new, old) in pairs.items() if new != old)
        yield _Candidate(
            shard=shard,
            sequence=sequence,
            policy=policy,
            offload=offload,
            micro=micro,
            asynchronous=copied,
            changes=changes,
            moved=_moves(recipe, processes, shard),
        )


def _moves(recipe: Recipe, processes: int, shard: int) -> bool:
    parallel = recipe.parallel
    asked = parallel.shard or (processes // parallel.replicate if parallel.replicate else None)
    return asked is not None and asked != shard


def _order(candidate: _Candidate) -> tuple[int, ...]:
    return (
        candidate.offload,
        len(candidate.changes) + candidate.moved,
        -candidate.shard if candidate.offload else candidate.shard,
        candidate.sequence,
        POLICIES.index(candidate.policy),
        -candidate.micro,
    )


def _changed(recipe: Recipe, candidate: _Candidate) -> Recipe:
    parallel = recipe.parallel.model_copy(
        update={
            "replicate": None,
            "shard": candidate.shard,
            "sequence": candidate.sequence,
            "cpu_offload": candidate.offload,
        }
    )
    train = recipe.train.model_copy(
        update={
            "activation_checkpointing": candidate.policy,
            "micro_batch_size": candidate.micro,
            "checkpoint": recipe.train.checkpoint.model_copy(
                update={"asynchronous": candidate.asynchronous}
            ),
        }
    )
    return recipe.model_copy(update={"parallel": parallel, "train": train})


def _plain(value: str | int | bool) -> str:
    return str(value).lower()
