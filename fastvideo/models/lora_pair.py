# SPDX-License-Identifier: Apache-2.0
"""The adapter of one projection, and how several are one where the model has them in one.

Axes: R rank, I inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """The projection's output grows by ``scale * (B (A x) + bias)``."""

    down: Tensor
    """A, (R, I); of a convolution (R, channels, ...)."""
    up: Tensor
    """B, (O, R); of a convolution (O, R, 1, ...)."""
    alpha: float
    bias: Tensor | None = None
    """(O,)."""

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank

    def change(self, kind: str) -> Tensor | None:
        """What is added to the projection's ``weight``, (O, I), or ``bias``, (O,); float32."""
        if kind == "weight":
            return self.up.flatten(1).float() @ self.down.flatten(1).float() * self.scale
        if kind == "bias" and self.bias is not None:
            return self.bias.float() * self.scale
        return None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; torch asks no floats of 8 bits."""
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def fuse(parts: Sequence[Pair | None], outputs: Sequence[int]) -> tuple[Pair, list[int]]:
    """Make one adapter of those of projections that share their input; None is one without.

    Parts with one A in common keep it; of others A is stacked and B is block-diagonal. The scale is
    that of the first: others are brought to it in B.

    Returns:
        The adapter, and the rank of each part; nothing where they share A.
    """
    given = [part for part in parts if part is not None]
    first = given[0]
    shared = len(given) == len(parts) and all(_shares(part, first) for part in given)
    ranks = [part.rank if part else 0 for part in parts]
    num_columns = first.rank if shared else sum(ranks)
    up = first.up.new_zeros(sum(outputs), num_columns)
    row = column = 0
    for part, height in zip(parts, outputs, strict=True):
        if part is not None:
            up[row : row + height, column : column + part.rank] = _rescaled(part.up, part, first)
            column += 0 if shared else part.rank
        row += height
    down = first.down if shared else torch.cat([part.down for part in given])
    alpha = first.alpha * num_columns / first.rank
    fused = Pair(down, up, alpha, _fused_bias(parts, outputs, first))
    return fused, [] if shared else ranks


def unfuse(
    fused: Pair, outputs: Sequence[int], ranks: Sequence[int] | None = None
) -> list[Pair | None]:
    """Take `fuse` apart; without ``ranks`` all parts share A."""
    biases = [None] * len(outputs) if fused.bias is None else fused.bias.split(list(outputs))
    rows = fused.up.split(list(outputs))
    shared = ranks is None
    parts: list[Pair | None] = []
    column = 0
    for up, bias, rank in zip(rows, biases, ranks or [fused.rank] * len(rows), strict=True):
        columns = slice(column, column + rank)
        alpha = fused.alpha * rank / fused.rank
        part = Pair(fused.down[columns], up[:, columns], alpha, bias)
        parts.append(_copied(part) if rank else None)
        column += 0 if shared else rank
    return parts


def _copied(pair: Pair) -> Pair:
    """In memory of its own: kernels round by the place."""
    bias = None if pair.bias is None else pair.bias.clone()
    down, up = (t.clone(memory_format=torch.contiguous_format) for t in (pair.down, pair.up))
    return Pair(down, up, pair.alpha, bias)


def swap_halves(pair: Pair) -> Pair:
    """Swap the halves of the outputs."""

    def swapped(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2)
        return torch.cat([second, first])

    bias = None if pair.bias is None else swapped(pair.bias)
    return replace(pair, up=swapped(pair.up), bias=bias)


def _shares(part: Pair, first: Pair) -> bool:
    return part.alpha == first.alpha and torch.equal(part.down, first.down)


def _rescaled(numbers: Tensor, part: Pair, first: Pair) -> Tensor:
    return numbers if part.scale == first.scale else numbers * (part.scale / first.scale)


def _fused_bias(parts: Sequence[Pair | None], outputs: Sequence[int], first: Pair) -> Tensor | None:
    if all(part is None or part.bias is None for part in parts):
        return None
    return torch.cat(
        [
            first.up.new_zeros(height)
            if part is None or part.bias is None
            else _rescaled(part.bias, part, first)
            for part, height in zip(parts, outputs, strict=True)
        ]
    )
