# SPDX-License-Identifier: Apache-2.0
"""What trains: every weight, or adapters beside a frozen model."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from fastvideo.config.train import Lora, Train
from fastvideo.models import adapters
from fastvideo.models.weights import WeightFiles, load_weights

Files = Callable[[], WeightFiles]
"""Opens the base model's files, the first time that they are needed."""


class Method(Protocol):
    """A way to finetune, orthogonal to the model, the attention and the layout."""

    def prepare(self, model: nn.Module) -> None:
        """Mark what trains and add what is missing, on the meta device."""

    def load_frozen(self, model: nn.Module, files: Files) -> None:
        """Read what no checkpoint holds."""

    def begin(self, model: nn.Module, files: Files) -> None:
        """Give what trains the numbers that it begins with."""

    def draw(self, model: nn.Module, seeds: Sequence[int], *, device: str) -> None:
        """Draw what is random in a micro-batch whose samples have these seeds."""


class FullFinetune:
    """Every weight trains and every weight is saved."""

    def prepare(self, model: nn.Module) -> None:
        """Let every parameter have a gradient."""
        model.requires_grad_(True)

    def load_frozen(self, model: nn.Module, files: Files) -> None:
        """Nothing is frozen: a resumed run reads its checkpoint only."""

    def begin(self, model: nn.Module, files: Files) -> None:
        """Read the base model's weights."""
        load_weights(model, files())

    def draw(self, model: nn.Module, seeds: Sequence[int], *, device: str) -> None:
        """Nothing is random."""


class LowRank:
    """Adapters train and are saved; the model is frozen, held in the dtype of the computation."""

    def __init__(self, spec: Lora, train: Train) -> None:
        """``spec`` is the method of ``train``."""
        self._spec, self._seed, self._dtype = spec, train.seed, getattr(torch, train.dtype)

    def prepare(self, model: nn.Module) -> None:
        """Add the adapters."""
        adapters.add_adapters(model, self._spec)
        adapters.hold_in(model, self._dtype)

    def load_frozen(self, model: nn.Module, files: Files) -> None:
        """Read the base model's weights."""
        load_weights(model, files(), names=adapters.base_names)

    def begin(self, model: nn.Module, files: Files) -> None:
        """Draw adapters that change nothing yet."""
        adapters.fill_adapters(model, seed=self._seed)

    def draw(self, model: nn.Module, seeds: Sequence[int], *, device: str) -> None:
        """Draw the masks of dropout."""
        if self._spec.dropout:
            adapters.draw_dropout(model, seeds, device=device)


def build_method(train: Train) -> Method:
    """Turn the recipe's ``train.method`` into a method."""
    spec = train.method
    return LowRank(spec, train) if isinstance(spec, Lora) else FullFinetune()
