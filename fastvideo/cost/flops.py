# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of training: what the model needs, and what the hardware is asked for.

A multiplication with its addition counts as 2. Only matrix products and attention are counted, the
rest is below 1 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.cost.activations import Policy
from fastvideo.cost.layers import Layers, block_of
from fastvideo.cost.transformer import tokens_of, tokens_per_sample, trained_layers
from fastvideo.cost.walk import Gradients, gradients

__all__ = ["Flops", "forward_flops", "hardware_flops", "tokens_per_sample", "training_flops"]


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

    def __add__(self, other: "Flops") -> "Flops":
        """Return both together."""
        return Flops(
            self.linear + other.linear,
            self.attention + other.attention,
            self.skipped + other.skipped,
        )


def forward_flops(recipe: Recipe, config: Mapping[str, Any]) -> Flops:
    """Of one sample's forward pass through the transformer of ``config``."""
    return _forward(_layers(recipe, config))


def training_flops(recipe: Recipe, config: Mapping[str, Any]) -> Flops:
    """Model FLOPs of one sample's forward and backward pass.

    Each product has two gradients, as many operations each: of its input where something trains
    before it, of its weights where they train. A full finetune takes three times the forward pass,
    but for the first layers; frozen projections between adapters take two times theirs.

    What checkpointing and attention kernels compute a second time does not count, so that a
    utilisation made from this number cannot be raised by computing more (Chowdhery et al., 2022,
    appendix B).
    """
    return training(_layers(recipe, config), _gradients(recipe, config))


def hardware_flops(recipe: Recipe, config: Mapping[str, Any]) -> Flops:
    """As `training_flops`, and the blocks that activation checkpointing computes a second time."""
    found, flow = _layers(recipe, config), _gradients(recipe, config)
    return training(found, flow) + again(found, flow, recipe.train.activation_checkpointing)


def training(found: Layers, flow: Gradients) -> Flops:
    """Of a forward and backward pass of one sample."""
    return _forward(found) + _backward(found, flow)


def again(found: Layers, flow: Gradients, policy: Policy) -> Flops:
    """Of what is computed a second time in the backward pass, blocks without gradients are not."""
    if policy == "none":
        return Flops(0, 0)
    linears = tuple(linear for linear in found.linears if block_of(linear.name) in flow.blocks)
    attentions = tuple(a for a in found.attentions if block_of(a.name) in flow.blocks)
    if policy == "selective":  # tokens' attention to each other is kept
        attentions = tuple(a for a in attentions if a.queries != a.keys)
    return _forward(replace(found, linears=linears, attentions=attentions))


def _layers(recipe: Recipe, config: Mapping[str, Any]) -> Layers:
    return trained_layers(recipe, config, tokens_of(recipe, config))


def _gradients(recipe: Recipe, config: Mapping[str, Any]) -> Gradients:
    return gradients(config, recipe.model.family, recipe.train.method)


def _forward(found: Layers) -> Flops:
    return Flops(
        linear=sum(linear.flops for linear in found.linears),
        attention=sum(attention.flops for attention in found.attentions),
    )


def _backward(found: Layers, flow: Gradients) -> Flops:
    weights = sum(linear.flops for linear in found.trained.linears)
    inputs = sum(linear.flops for linear in found.linears if linear.name in flow.inputs)
    # The forward pass of attention is two products of the same size as each of the backward pass.
    attention = sum(a.flops // 2 * flow.products[a.name] for a in found.attentions)
    return Flops(weights + inputs, attention)
