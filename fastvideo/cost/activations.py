# SPDX-License-Identifier: Apache-2.0
"""Bytes that wait on a GPU for the backward pass of one micro-batch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fastvideo.config.train import Full, Lora
from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import Tape
from fastvideo.cost.transformer import FULL, layers
from fastvideo.cost.walk import Parts, has_gradient, memory_of, parts_of

Policy = Literal["none", "selective", "full"]
"""``train.activation_checkpointing``."""


@dataclass(frozen=True)
class Saved:
    """Bytes of tensors; each counts once, parameters do not count.

    ``forward`` is what the forward pass leaves behind. Of a block that is computed again in the
    backward pass, ``block`` comes on top: the largest there is.
    """

    forward: int
    block: int

    @property
    def peak(self) -> int:
        """Both, as at the first block of the backward pass."""
        return self.forward + self.block


@dataclass(frozen=True)
class Computation:
    """How a forward pass is computed, as far as it matters for what is kept.

    ``gpu`` is whether by the rules of GPUs or of CPUs (`Tape`), ``sequence`` how many processes
    share a sample.
    """

    dtype: str = "bfloat16"
    gpu: bool = True
    policy: Policy = "none"
    sequence: int = 1


AS_IT_IS = Computation()


def saved(
    config: Mapping[str, Any],
    family: str,
    tokens: Tokens,
    *,
    method: Full | Lora = FULL,
    how: Computation = AS_IT_IS,
) -> Saved:
    """Count what autograd keeps of a forward pass of ``tokens``.

    Attention counts as flash attention and its kin: queries, keys, values, output and the
    log-sum-exp of each query, never the scores. Of processes that share a sample, the one with the
    most tokens is meant. Compiled blocks keep less.
    """
    # Searches for a layout that fits ask again and again.
    return _saved(json.dumps(config), family, tokens, method, how)


@lru_cache(maxsize=512)
def _saved(text: str, family: str, tokens: Tokens, method: Full | Lora, how: Computation) -> Saved:
    config = json.loads(text)
    found = layers(config, family, tokens, method=method)
    tape = Tape(found, batch=tokens.batch, dtype=how.dtype, gpu=how.gpu)
    parts = parts_of(config, family, tokens, shared=how.sequence)
    if how.policy == "none":
        return _all_kept(parts, found.blocks, tape)
    return _computed_again(parts, found.blocks, tape, how.policy)


def _all_kept(parts: Parts, blocks: Sequence[str], tape: Tape) -> Saved:
    x, condition = parts.entry(tape)
    for name in blocks:
        x = parts.block(tape, name, x, condition)
    parts.leave(tape, x, condition)
    return Saved(tape.bytes, 0)


def _computed_again(parts: Parts, blocks: Sequence[str], tape: Tape, policy: Policy) -> Saved:
    """Of each block only the inputs stay, and with ``selective`` what attention gave.

    Blocks before the first that trains keep nothing.
    """
    x, condition = parts.entry(tape)
    largest = 0
    for name in blocks:
        again = tape.fresh()
        known = [*memory_of(x), *condition.values]
        x = parts.block(again, name, x, condition)
        if not has_gradient(x):
            continue
        tape.keep(*known)
        if policy == "selective":
            tape.keep(*again.attended)
            known += again.attended
        largest = max(largest, again.without(known))
    parts.leave(tape, x, condition)
    return Saved(tape.bytes, largest)
