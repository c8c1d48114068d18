# SPDX-License-Identifier: Apache-2.0
"""The layers of a transformer that is frozen, and of the adapters that train in its place."""

from collections.abc import Iterator
from dataclasses import replace

from fastvideo.config.lora import targets
from fastvideo.config.train import Lora
from fastvideo.cost.layers import Layers, Linear, block_of

DOWN, UP = "lora_A", "lora_B"
"""Names of an adapter's two matrices below the projection's, as peft has them."""


def projections(found: Layers) -> list[str]:
    """Names of what may get an adapter: matrix products, no convolutions."""
    return [linear.name for linear in found.linears if not linear.convolution]


def is_up(linear: Linear) -> bool:
    """Whether it is an adapter's second matrix, which each has one of."""
    return linear.name.endswith(f".{UP}")


def adapted(found: Layers, method: Lora) -> Layers:
    """Freeze all of ``found`` but what ``method`` trains, and add the adapters.

    Raises:
        UserError: ``method.targets`` match nothing.
    """
    chosen = set(targets(method, projections(found)))
    adapters = tuple(
        part
        for linear in found.linears
        if linear.name in chosen
        for part in _adapter(linear, method)
    )
    trained = set(_norms(found)) if method.norms else set()
    names = {linear.name for linear in found.linears} | found.tables.keys()
    return replace(
        found,
        linears=found.linears + adapters,
        frozen=frozenset(names - trained),
        dropout=method.dropout > 0,
    )


def _adapter(linear: Linear, method: Lora) -> Iterator[Linear]:
    """Down to the rank and up again, in the dtype in which ``linear`` computes."""
    name = linear.name
    yield replace(linear, name=f"{name}.{DOWN}", outputs=method.rank, bias=False)
    yield replace(linear, name=f"{name}.{UP}", inputs=method.rank, bias=method.biases)


def _norms(found: Layers) -> Iterator[str]:
    """Weights and biases of the blocks' norms; modulations are none."""
    for name in found.tables:
        if block_of(name) in found.blocks and name.endswith((".weight", ".bias")):
            yield name
