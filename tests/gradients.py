# SPDX-License-Identifier: Apache-2.0
"""Gradients of two forward passes, and how far they are apart."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn


def relative(a: Tensor, b: Tensor) -> float:
    """Distance in the 2-norm, as a share of the norm of ``b``."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


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
