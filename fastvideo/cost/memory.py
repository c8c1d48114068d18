# SPDX-License-Identifier: Apache-2.0
"""Bytes that training needs on each GPU, by part."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.cost.transformer import parameters, tokens_of

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Each part by its name."""
        return asdict(self)


def memory(recipe: Recipe, config: Mapping[str, Any], *, processes: int, shard: int) -> Memory:
    """Bytes of each GPU for weights spread over ``shard`` of ``processes``; the numbers divide."""
    number = parameters(config, recipe.model.family)
    tokens = tokens_of(recipe, config)
    return Memory(
        weights=4 * number // shard,
        gradients=4 * number // shard,
        optimizer=8 * number // shard,
        activations=100 * tokens.video * config["num_attention_heads"] * 128,
        workspace=GIB,
    )
