# SPDX-License-Identifier: Apache-2.0
"""What trains and what is saved: every weight here; adapters are one more class."""

from typing import Protocol

from torch import nn

from fastvideo.config.train import Full, Lora


class Method(Protocol):
    """A way to finetune, orthogonal to the model, the attention and the layout."""

    def prepare(self, model: nn.Module) -> None:
        """Mark what trains, add what is missing."""


class FullFinetune:
    """Every weight trains and every weight is saved."""

    def prepare(self, model: nn.Module) -> None:
        """Let every parameter have a gradient."""
        model.requires_grad_(True)


def build_method(spec: Full | Lora) -> Method:
    """Turn the recipe's ``train.method`` into a method."""
    assert isinstance(spec, Full)
    return FullFinetune()
