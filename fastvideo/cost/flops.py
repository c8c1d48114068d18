# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of training: what the model needs, and what the hardware is asked for.

A multiplication with its addition counts as 2. Only matrix products and attention are counted, the
rest is below 1 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.cost.layers import Layers
from fastvideo.cost.transformer import layers, tokens_of, tokens_per_sample

__all__ = ["Flops", "forward_flops", "hardware_flops", "tokens_per_sample", "training_flops"]

BACKWARD = 2
"""Backward passes take this many times the forward: each product has two gradients."""


@dataclass(frozen=True)
class Flops:
    """A number of operations in two parts; ``attention`` as if every pair of tokens counted.

    ``skipped`` is the share of ``attention`` that sparse kernels leave out, none in dense training.
    """

    linear: int
    attention: int
    skipped: int = 0

    @property
    def dense_equivalent(self) -> int:
        """What dense attention would take for the same result; for comparing speeds."""
        return self.linear + self.attention

    @property
    def actual(self) -> int:
        """What is computed; for model FLOPs utilisation."""
        return self.dense_equivalent - self.skipped

    def times(self, factor: int) -> "Flops":
        """Return as many of these."""
        return Flops(self.linear * factor, self.attention * factor, self.skipped * factor)


def forward_flops(recipe: Recipe, config: Mapping[str, Any]) -> Flops:
    """Of one sample's forward pass through the transformer of ``config``."""
    return _count(layers(config, recipe.model.family, tokens_of(recipe, config)))


def training_flops(recipe: Recipe, config: Mapping[str, Any]) -> Flops:
    """Model FLOPs of one sample's forward and backward pass: three times the forward.

    What checkpointing and attention kernels compute a second time does not count, so that a
    utilisation made from this number cannot be raised by computing more (Chowdhery et al., 2022,
    appendix B).
    """
    return forward_flops(recipe, config).times(1 + BACKWARD)


def hardware_flops(recipe: Recipe, config: Mapping[str, Any]) -> Flops:
    """As `training_flops`, and the blocks that activation checkpointing computes a second time."""
    policy = recipe.train.activation_checkpointing
    training = training_flops(recipe, config)
    if policy == "none":
        return training
    blocks = _blocks_only(layers(config, recipe.model.family, tokens_of(recipe, config)))
    again = _count(blocks)
    attention = again.attention
    if policy == "selective":  # tokens' attention to each other is kept
        attention = sum(a.flops for a in blocks.attentions if a.queries != a.keys)
    return Flops(training.linear + again.linear, training.attention + attention, training.skipped)


def _blocks_only(found: Layers) -> Layers:
    prefixes = tuple(f"{block}." for block in found.blocks)
    linears = (linear for linear in found.linears if linear.name.startswith(prefixes))
    attentions = tuple(a for a in found.attentions if a.in_block)
    return Layers(tuple(linears), {}, attentions, found.blocks)


def _count(found: Layers) -> Flops:
    return Flops(
        linear=sum(linear.flops for linear in found.linears),
        attention=sum(attention.flops for attention in found.attentions),
    )
