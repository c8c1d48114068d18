# SPDX-License-Identifier: Apache-2.0
"""The `parallel` table of a recipe: how many processes train together, and what each one holds."""

from typing import Literal

from pydantic import PositiveInt

from fastvideo.config.spec import Spec


class Parallel(Spec):
    """Processes that train together; the layout changes results only by the order of sums.

    Two views of the same processes: weights lie on `replicate` x `shard` of them, and the samples
    of a step are dealt out to groups of `sequence` neighbours.
    """

    processes: PositiveInt | None = None
    """Processes on each node; empty takes one per GPU, or one where there is none."""
    replicate: PositiveInt | None = None
    """Whole copies of weights, gradients and optimizer state; `replicate` x `shard` is the number
    of all processes. Empty takes what `shard` leaves."""
    shard: PositiveInt | None = None
    """Processes that one copy is spread over (FSDP2); 1 keeps it whole (DDP), 1 < shard < all
    processes is HSDP. Empty takes what `replicate` leaves; if both are empty, 1 if that fits into
    the memory of the device, else as many as there are."""
    sequence: PositiveInt = 1
    """Neighbouring processes that share the tokens of each sample (Ulysses); divides the number of
    processes and that of the model's attention heads."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are summed over processes; bfloat16 halves the traffic."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory, bring each block to the GPU for
    its turn only (FSDP2); slow, saves the most memory."""
