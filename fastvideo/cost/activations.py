# SPDX-License-Identifier: Apache-2.0
"""Bytes that wait on a GPU for the backward pass of one micro-batch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from fastvideo.cost.hunyuan_saved import HunyuanSaved
from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import Tape, Value
from fastvideo.cost.transformer import is_hunyuan
from fastvideo.cost.wan_saved import WanSaved

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


class _Parts(Protocol):
    """The forward pass of a family, on a tape; streams are its own affair."""

    @property
    def blocks(self) -> list[str]: ...

    def entry(self, tape: Tape) -> tuple[Any, Any]: ...

    def block(self, tape: Tape, kind: str, x: Any, condition: Any) -> Any: ...

    def leave(self, tape: Tape, x: Any) -> None: ...


@dataclass(frozen=True)
class Kernels:
    """In which dtype is computed, and whether by the rules of GPUs or of CPUs (`Tape`)."""

    dtype: str = "bfloat16"
    gpu: bool = True


def saved(
    config: Mapping[str, Any],
    family: str,
    tokens: Tokens,
    *,
    policy: Policy = "none",
    sequence: int = 1,
    kernels: Kernels = Kernels(),
) -> Saved:
    """Count what autograd keeps of a forward pass of ``tokens``.

    Attention counts as flash attention and its kin: queries, keys, values, output and the
    log-sum-exp of each query, never the scores. With ``sequence`` processes to a sample, the one
    with the most tokens is meant. Compiled blocks keep less.
    """
    # Searches for a layout that fits ask again and again.
    return _saved(json.dumps(config), family, tokens, policy, sequence, kernels)


@lru_cache(maxsize=512)
def _saved(
    config: str, family: str, tokens: Tokens, policy: Policy, sequence: int, kernels: Kernels
) -> Saved:
    build = HunyuanSaved if is_hunyuan(family) else WanSaved
    parts: _Parts = build(json.loads(config), tokens, shared=sequence)
    if policy == "none":
        return _all_kept(parts, Tape(dtype=kernels.dtype, gpu=kernels.gpu))
    return _computed_again(parts, policy, kernels)


def _all_kept(parts: _Parts, tape: Tape) -> Saved:
    x, condition = parts.entry(tape)
    for kind in parts.blocks:
        x = parts.block(tape, kind, x, condition)
    parts.leave(tape, x)
    return Saved(tape.bytes, 0)


def _computed_again(parts: _Parts, policy: Policy, kernels: Kernels) -> Saved:
    """Of each block only the inputs stay, and with ``selective`` what attention gave."""
    tape = Tape(dtype=kernels.dtype, gpu=kernels.gpu)
    x, condition = parts.entry(tape)
    tape.keep(*condition.values)
    largest = 0
    for kind in parts.blocks:
        again = Tape(dtype=kernels.dtype, gpu=kernels.gpu)
        inputs = list(_memory(x))
        tape.keep(*inputs)
        x = parts.block(again, kind, x, condition)
        known = [*inputs, *condition.values]
        if policy == "selective":
            tape.keep(*again.attended)
            known += again.attended
        largest = max(largest, again.without(known))
    parts.leave(tape, x)
    return Saved(tape.bytes, largest)


def _memory(x: Any) -> Iterator[Value]:
    """Where the tokens between two blocks lie."""
    yield from ([x] if isinstance(x, Value) else x.values)
