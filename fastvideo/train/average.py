# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of what trains, spread over processes as the weights are."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastvideo.checkpoint import Saved
from fastvideo.config.train import Ema
from fastvideo.models.weights import local_part


def empty_average(model: nn.Module) -> dict[str, Tensor]:
    """Make room for an average of all that trains, by the names of the parameters."""
    return {name: torch.zeros_like(p) for name, p in _trained(model).items()}


@torch.no_grad()
def update(saved: Saved, spec: Ema, *, step: int) -> None:
    """Move the average towards the weights after ``step``, counted from 1."""
    parameters = _trained(saved.model)
    torch._foreach_lerp_(
        [local_part(saved.average[name]) for name in parameters],
        [local_part(parameter) for parameter in parameters.values()],
        1 - decay_at(spec, step=step),
    )


def decay_at(spec: Ema, *, step: int) -> float:
    """The share of the average that stays in ``step``."""
    return min(spec.decay, (1 + step) / (10 + step)) if spec.warmup else spec.decay


@contextlib.contextmanager
def evaluated(saved: Saved) -> Iterator[None]:
    """Around passes that measure: no dropout, and the average in place of the weights."""
    saved.model.eval()
    _exchange(saved)
    try:
        yield
    finally:
        _exchange(saved)
        saved.model.train()


@torch.no_grad()
def _exchange(saved: Saved) -> None:
    """Swap weights and average, if there is one."""
    if not saved.average:
        return
    for module in saved.model.modules():
        if isinstance(module, FSDPModule):  # what is gathered stays so after a last forward pass
            module.reshard()
    for name, parameter in _trained(saved.model).items():
        ours, other = local_part(parameter), local_part(saved.average[name])
        kept = ours.clone()
        ours.copy_(other)
        other.copy_(kept)


def _trained(model: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
