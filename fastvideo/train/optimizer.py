# SPDX-License-Identifier: Apache-2.0
"""The optimizer over what trains, and the norm that gradients are scaled down to."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastvideo.config.train import AdamW

Group = dict[str, Any]


def build_optimizer(model: nn.Module, spec: AdamW) -> torch.optim.Optimizer:
    """AdamW over what trains; weight decay on matrices only, never on norms, biases and tables."""
    return torch.optim.AdamW(
        _groups(model, spec), lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True
    )


def _groups(model: nn.Module, spec: AdamW) -> list[Group]:
    """Parameters by decay and by kind: kernels over many tensors take plain ones or DTensors."""
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (decayed, spread): [] for decayed in (True, False) for spread in (False, True)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (_is_matrix(name, parameter), isinstance(parameter, DTensor))
            kinds[kind].append(parameter)
    return [
        {"params": parameters, "weight_decay": spec.weight_decay if decayed else 0.0}
        for (decayed, _), parameters in kinds.items()
        if parameters
    ]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("scale_shift_table")


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their 2-norm over all parameters is at most ``max_norm``.

    In one process these are the numbers of ``torch.nn.utils.clip_grad_norm_``, bit for bit. Over
    several, a gradient that is a DTensor counts as the whole it is a part of, and a plain one,
    which each process has alike, counts once.

    Returns:
        The norm before scaling, a plain tensor (), the same in all processes; not finite if a
        gradient is not.
    """
    having = [p for p in parameters if p.grad is not None]
    kinds = [
        [p for p in having if not isinstance(p.grad, DTensor)],
        [p for p in having if isinstance(p.grad, DTensor)],
    ]
    norms = [_norm(kind) for kind in kinds if kind]
    if not norms:
        return torch.zeros(())
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
