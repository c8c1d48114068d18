# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a transformer on a tape, block by block; and where its gradients flow."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from fastvideo.config.train import Full, Lora
from fastvideo.cost.hunyuan_saved import HunyuanSaved
from fastvideo.cost.layers import Tokens
from fastvideo.cost.tape import Tape, Value
from fastvideo.cost.transformer import is_hunyuan, layers
from fastvideo.cost.wan_saved import WanSaved


class Parts(Protocol):
    """The forward pass of a family; streams are its own affair."""

    def entry(self, tape: Tape) -> tuple[Any, Any]:
        """What comes before the blocks: the tokens, and what every block sees beside them."""

    def block(self, tape: Tape, name: str, x: Any, condition: Any) -> Any:
        """The block of a name."""

    def leave(self, tape: Tape, x: Any, condition: Any) -> None:
        """What comes after the blocks."""


def parts_of(config: Mapping[str, Any], family: str, tokens: Tokens, *, shared: int = 1) -> Parts:
    """Return the forward pass of a micro-batch, each sample of which ``shared`` processes share."""
    build = HunyuanSaved if is_hunyuan(family) else WanSaved
    return build(config, tokens, shared=shared)


def memory_of(x: Any) -> list[Value]:
    """Where the tokens between two blocks lie."""
    return [x] if isinstance(x, Value) else list(x.values)


def has_gradient(x: Any) -> bool:
    """Whether anything that trains went into the tokens."""
    return any(value.grad for value in memory_of(x))


@dataclass(frozen=True)
class Gradients:
    """What the backward pass computes beside the gradients of what trains.

    ``inputs`` are the linears whose input has a gradient, ``products`` how many of an attention's
    four matrix products are needed, ``blocks`` those that are passed at all.
    """

    inputs: frozenset[str]
    products: Mapping[str, int]
    blocks: frozenset[str]


def gradients(config: Mapping[str, Any], family: str, method: Full | Lora) -> Gradients:
    """Follow the gradients through a transformer that is trained with ``method``."""
    return _gradients(json.dumps(config), family, method)


@lru_cache(maxsize=16)
def _gradients(text: str, family: str, method: Full | Lora) -> Gradients:
    config, few = json.loads(text), Tokens(video=1, text=1, image=1)
    found = layers(config, family, few, method=method)
    tape = Tape(found, batch=1, dtype="float32", gpu=True)
    parts, blocks = parts_of(config, family, few), []
    x, condition = parts.entry(tape)
    for name in found.blocks:
        x = parts.block(tape, name, x, condition)
        if has_gradient(x):
            blocks.append(name)
    parts.leave(tape, x, condition)
    return Gradients(frozenset(tape.reached), tape.products, frozenset(blocks))
