# SPDX-License-Identifier: Apache-2.0
"""What trains and what is saved: every weight here; adapters are one more class."""

from typing import Protocol

import torch
from torch import nn

from fastvideo.config.train import AdamW, Full


class Method(Protocol):
    """A way to finetune, orthogonal to the model, the attention and the layout."""

    def prepare(self, model: nn.Module) -> None:
        """Mark what trains, add what is missing."""


class FullFinetune:
    """Every weight trains and every weight is saved."""

    def prepare(self, model: nn.Module) -> None:
        """Let every parameter have a gradient."""
        model.requires_grad_(True)


def build_method(spec: Full) -> Method:
    """Turn the recipe's ``train.method`` into a method."""
    assert isinstance(spec, Full)
    return FullFinetune()


def build_optimizer(model: nn.Module, spec: AdamW) -> torch.optim.Optimizer:
    """AdamW over what trains; weight decay on matrices only, never on norms, biases and tables."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if _is_matrix(name, p)]
    others = [p for name, p in trained if not _is_matrix(name, p)]
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        fused=True,
    )


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("scale_shift_table")
