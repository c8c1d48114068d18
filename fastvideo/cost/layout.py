# SPDX-License-Identifier: Apache-2.0
"""How the processes of a training are laid out, and what is wrong with a layout asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.cost.memory import GIB, Memory, memory
from fastvideo.errors import UserError


@dataclass(frozen=True)
class Layout:
    """``replicate`` x ``shard`` processes hold the weights, ``sequence`` of them share a sample."""

    replicate: int
    shard: int
    sequence: int
    reason: str

    @property
    def processes(self) -> int:
        """All of them."""
        return self.replicate * self.shard

    @property
    def data(self) -> int:
        """Groups that the samples of a step are dealt out to."""
        return self.processes // self.sequence


def choose(
    recipe: Recipe, config: Mapping[str, Any], *, processes: int, memory_gib: float | None
) -> Layout:
    """Settle ``recipe.parallel``, whose empty keys are derived, for a number of processes.

    Args:
        recipe: What is trained.
        config: The transformer's config.json.
        processes: All processes of all nodes.
        memory_gib: Of one GPU; None where memory is not to decide, as on a CPU.

    Raises:
        UserError: Numbers that do not divide, all of them, each with the nearest that do.
    """
    found = problems(recipe, config, processes=processes)
    if found:
        raise UserError("\n".join(found))
    replicate, shard, reason = _weights(recipe, config, processes, memory_gib)
    return Layout(replicate, shard, recipe.parallel.sequence, reason)


def is_open(recipe: Recipe, *, processes: int) -> bool:
    """Whether the memory of a GPU decides between whole copies (DDP) and one copy over all."""
    return _settled(recipe, processes) is None


def problems(recipe: Recipe, config: Mapping[str, Any], *, processes: int) -> list[str]:
    """Say which numbers of the recipe do not divide, and the nearest that do; empty if all do."""
    found = [*_weight_problems(recipe, processes), *_optimizer_problems(recipe, processes)]
    sequence = _sequence_problems(recipe, config, processes)
    return found + (sequence or _batch_problems(recipe, config, processes))


def nearest(value: int, allowed: list[int]) -> str:
    """Write the next smaller and the next larger of some numbers: ``6 or 9``."""
    below, above = [n for n in allowed if n < value], [n for n in allowed if n > value]
    return " or ".join(map(str, below[-1:] + above[:1]))


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def describe(found: Memory) -> str:
    """The parts of a GPU's memory as a sum, GiB, and what sampling takes if that is more."""
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in found.parts().items() if size)
    more = f", {found.sampling / GIB:.1f} GiB while videos are sampled"
    return f"{parts} = {found.total / GIB:.1f} GiB{more if found.sampling > found.total else ''}"


def _weights(
    recipe: Recipe, config: Mapping[str, Any], processes: int, memory_gib: float | None
) -> tuple[int, int, str]:
    settled = _settled(recipe, processes)
    if settled is not None:
        return settled
    if memory_gib is None:
        return processes, 1, "DDP: no GPU memory to fit into"
    whole = memory(recipe, config, processes=processes, shard=1)
    if whole.peak <= memory_gib * GIB:
        return processes, 1, f"DDP: {describe(whole)} fits into {memory_gib:.1f} GiB"
    spread = memory(recipe, config, processes=processes, shard=processes)
    verdict = "fits" if spread.peak <= memory_gib * GIB else "is the least there is"
    return (
        1,
        processes,
        f"FSDP: whole copies need {describe(whole)}, more than {memory_gib:.1f} GiB; "
        f"over {processes} processes {spread.peak / GIB:.1f} GiB {verdict}",
    )


def _settled(recipe: Recipe, processes: int) -> tuple[int, int, str] | None:
    """What does not depend on the memory of a GPU."""
    parallel = recipe.parallel
    if parallel.shard or parallel.replicate:
        shard = parallel.shard or processes // (parallel.replicate or 1)
        return processes // shard, shard, "as parallel.replicate and parallel.shard say"
    if processes == 1:
        return 1, 1, "one process"
    if parallel.cpu_offload:
        return 1, processes, "FSDP: over all processes parallel.cpu_offload takes the least"
    if recipe.train.optimizer.kind == "apex_adamw":
        return processes, 1, "DDP: apex_adamw needs whole weights"
    return None


def _weight_problems(recipe: Recipe, processes: int) -> list[str]:
    """``parallel.replicate`` times ``parallel.shard`` is the number of processes."""
    replicate, shard = recipe.parallel.replicate, recipe.parallel.shard
    if replicate and shard:
        if replicate * shard == processes:
            return []
        fits = [f"use {key}={n}" for key, n in _partners(replicate, shard, processes)]
        return [
            f"parallel.replicate={replicate} x parallel.shard={shard} makes {replicate * shard} "
            f"processes, not {processes}; {', '.join([*fits, 'leave both empty'])}"
        ]
    return [
        f"parallel.{key}={value}: does not divide the {processes} processes; use "
        f"{nearest(value, divisors(processes))}"
        for key, value in (("replicate", replicate), ("shard", shard))
        if value and processes % value
    ]


def _partners(replicate: int, shard: int, processes: int) -> list[tuple[str, int]]:
    """What either key would have to be for the other to stay."""
    found = []
    if processes % shard == 0:
        found.append(("parallel.replicate", processes // shard))
    if processes % replicate == 0:
        found.append(("parallel.shard", processes // replicate))
    return found


def _optimizer_problems(recipe: Recipe, processes: int) -> list[str]:
    parallel = recipe.parallel
    shard = parallel.shard or (processes // parallel.replicate if parallel.replicate else 1)
    spread = shard > 1 or parallel.cpu_offload
    if recipe.train.optimizer.kind != "apex_adamw" or not spread:
        return []
    why = "parallel.cpu_offload=true" if parallel.cpu_offload else f"parallel.shard is {shard}"
    return [
        f"train.optimizer.kind=apex_adamw: works with whole weights only, here {why}; use adamw, "
        "or parallel.shard=1 without parallel.cpu_offload"
    ]


def _sequence_problems(recipe: Recipe, config: Mapping[str, Any], processes: int) -> list[str]:
    sequence, heads = recipe.parallel.sequence, int(config["num_attention_heads"])
    faults = [
        text
        for number, text in (
            (processes, f"the {processes} processes"),
            (heads, f"the model's {heads} attention heads"),
        )
        if number % sequence
    ]
    if not faults:
        return []
    # Of no help if the batch cannot be dealt out then; if none is, the batch is told next.
    allowed = _sequences(recipe, heads, processes) or divisors(math.gcd(processes, heads))
    return [
        f"parallel.sequence={sequence}: does not divide {' nor '.join(faults)}; use "
        f"{nearest(sequence, allowed)}"
    ]


def _sequences(recipe: Recipe, heads: int, processes: int) -> list[int]:
    """Numbers of processes to a sample with which the batch can be dealt out, ascending."""
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size or 1
    return [
        sequence
        for sequence in divisors(math.gcd(processes, heads))
        if batch % (processes // sequence * micro) == 0
    ]


def _batch_problems(recipe: Recipe, config: Mapping[str, Any], processes: int) -> list[str]:
    """Each group of processes gets as many samples of a step, in whole micro-batches."""
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    sequence = recipe.parallel.sequence
    groups = processes // sequence
    if batch % groups:
        share = f" of {sequence}" if sequence > 1 else ""
        below = batch // groups * groups
        helping = _sequences(recipe, int(config["num_attention_heads"]), processes)
        other = f", or parallel.sequence={nearest(sequence, helping)}" if helping else ""
        return [
            f"train.global_batch_size={batch}: cannot be dealt out to {groups} groups{share} of "
            f"the {processes} processes; use "
            f"{nearest(batch, [below, below + groups][not below :])}{other}"
        ]
    if micro and batch // groups % micro:
        return [
            f"train.micro_batch_size={micro}: does not divide the {batch // groups} samples of a "
            f"process (train.global_batch_size={batch} over {groups}); use "
            f"{nearest(micro, divisors(batch // groups))}"
        ]
    return []
