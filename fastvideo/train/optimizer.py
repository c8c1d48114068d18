# SPDX-License-Identifier: Apache-2.0
"""The optimizer over what trains, and the norm that gradients are scaled down to."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastvideo.config.train import AdamW
from fastvideo.errors import UserError

Group = dict[str, Any]


def build_optimizer(model: nn.Module, spec: AdamW) -> torch.optim.Optimizer:
    """AdamW over what trains; weight decay on matrices only, never on norms, biases and tables.

    The model is where it trains, and spread over processes as it trains.

    Raises:
        UserError: apex is asked for where its kernels do not work.
    """
    groups = _groups(model, spec)
    settings: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
    if spec.kind == "apex_adamw":
        return _apex(groups, settings)
    if spec.kind == "adamw_8bit":
        from fastvideo.train.adamw_8bit import AdamW8bit

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def _apex(groups: list[Group], settings: dict[str, Any]) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(isinstance(p, DTensor) or p.device.type != "cuda" for p in parameters):
        raise UserError(
            "train.optimizer.kind=apex_adamw: takes whole weights on a GPU only; use "
            "parallel.shard=1 without parallel.cpu_offload, or adamw"
        )
    from apex.optimizers import FusedAdam

    optimizer: torch.optim.Optimizer = FusedAdam(groups, **settings, adam_w_mode=True)
    return optimizer


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
    norm = norms[0] if len(norms) == 1 else _together(norms)
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _together(norms: list[Tensor]) -> Tensor:
    """The norm of some norms; offloaded gradients lie on the host, others do not."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return norm
