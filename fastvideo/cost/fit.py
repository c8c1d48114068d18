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
    offload: bool = True,
) -> Setting | None:
    """Find a setting that fits; None if none does with this number of processes.

    Fewest changed keys first, of those the fastest: weights in host memory last, whole copies
    before sharded ones, samples on one process before shared ones, and nothing computed again
    before attention kept before all computed again. Without ``offload`` nothing moves to the host.
    """
    for candidate in sorted(_candidates(recipe, config, processes), key=_order):
        if candidate.offload and not (offload or recipe.parallel.cpu_offload):
            continue
        changed = _changed(recipe, candidate)
        if problems(changed, config, processes=processes):
            continue
        needed = memory(changed, config, processes=processes, shard=candidate.shard)
        if needed.total <= memory_gib * GIB:
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
    changes: tuple[tuple[str, str | int | bool], ...]
    """Keys beside ``parallel.replicate`` and ``parallel.shard`` that differ from the recipe's."""
    moved: bool
    """Whether those two do."""


def _candidates(recipe: Recipe, config: Mapping[str, Any], processes: int) -> Iterator[_Candidate]:
    parallel, train = recipe.parallel, recipe.train
    sequences = divisors(math.gcd(processes, int(config["num_attention_heads"])))
    micros = sorted({micro_batch(recipe, processes=processes), 1}, reverse=True)
    for shard, sequence, policy, offload, micro in itertools.product(
        divisors(processes), sequences, POLICIES, {parallel.cpu_offload, True}, micros
    ):
        pairs: dict[str, tuple[str | int | bool, str | int | bool]] = {
            "parallel.sequence": (sequence, parallel.sequence),
            "train.activation_checkpointing": (policy, train.activation_checkpointing),
            "parallel.cpu_offload": (offload, parallel.cpu_offload),
            "train.micro_batch_size": (micro, micro_batch(recipe, processes=processes)),
        }
        if offload and shard == 1 < processes:  # only spread weights can wait on the host
            continue
        changes = tuple((key, new) for key, (new, old) in pairs.items() if new != old)
        yield _Candidate(
            shard, sequence, policy, offload, micro, changes, _moves(recipe, processes, shard)
        )


def _moves(recipe: Recipe, processes: int, shard: int) -> bool:
    parallel = recipe.parallel
    asked = parallel.shard or (processes // parallel.replicate if parallel.replicate else None)
    return asked is not None and asked != shard


def _order(candidate: _Candidate) -> tuple[int, ...]:
    return (
        candidate.offload,
        len(candidate.changes) + candidate.moved,
        candidate.shard,
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
        }
    )
    return recipe.model_copy(update={"parallel": parallel, "train": train})


def _plain(value: str | int | bool) -> str:
    return str(value).lower()
