# SPDX-License-Identifier: Apache-2.0
"""Gradients of two forward passes, and how far they are apart."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn


def relative(a: Tensor, b: Tensor) -> float:
    """Distance in the 2-norm, as a share of the norm of ``b``."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def distances(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Distance of each gradient, as a share of the norm of its module's, weight and bias together.

    What the bias of a key sums over all tokens nearly cancels: what its rounding is to the little
    that is left depends on the processor.
    """
    assert found.keys() == expected.keys()
    squares: dict[str, float] = defaultdict(float)
    for name, tensor in expected.items():
        squares[_module(name)] += tensor.detach().double().square().sum().item()
    return {
        name: float((found[name].detach().double() - tensor.detach().double()).norm())
        / max(squares[_module(name)], 1e-300) ** 0.5
        for name, tensor in expected.items()
    }


def _module(name: str) -> str:
    return name.removesuffix(".bias").removesuffix(".weight")


def gradients(
    run: Callable[..., Tensor],
    model: nn.Module,
    given: Mapping[str, Tensor],
    *,
    fixed: Collection[str],
) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the output in parameters and inputs that are not ``fixed``."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items() if name not in fixed}
    model.zero_grad()
    output = run(model, {**given, **leaves})
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)))
    found = {}
    for name, leaf in (*model.named_parameters(), *leaves.items()):
        assert leaf.grad is not None, name
        found[name] = leaf.grad.clone()
    return found
