# SPDX-License-Identifier: Apache-2.0
"""Adapters of a checkpoint as LoRA files have them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvideo import state
from fastvideo.checkpoint import Part, read_tensors, verify
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.models import adapters
from fastvideo.models.family import find_family
from fastvideo.models.lora_file import Adapter


@dataclass(frozen=True)
class TrainedAdapter:
    """What was trained of a transformer, on the host, float32."""

    adapter: Adapter
    others: Mapping[str, Tensor]
    """Norms, by their names in the model's files; none unless ``train.method.norms``."""


def method_of(checkpoint: Path) -> Lora:
    """How the adapters of a complete checkpoint were made; experts may differ in it."""
    marker = state.read_checkpoint_marker(checkpoint)
    assert marker is not None
    return Lora.model_validate(marker["about"]["settings"])


def read_adapter(
    recipe: Recipe, base: Path, *, transformer: str, checkpoint: Path, part: Part = "model"
) -> TrainedAdapter:
    """Read what a run of ``train.method.kind: lora`` trained.

    Args:
        recipe: Of the run, see ``fastvideo.trained.newest``.
        base: Folder of the base model, of which configurations are read only.
        transformer: Folder of the transformer in it.
        checkpoint: A complete one.
        part: The weights, or their average.

    Raises:
        UserError: The checkpoint is damaged or lacks tensors.
    """
    method = method_of(checkpoint)
    verify(checkpoint)
    model: Any = find_family(recipe).empty_transformer(base, folder=transformer)
    adapters.add_adapters(model, method)
    like = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = read_tensors(checkpoint, like, part=part)
    tensors = adapters.adapter_tensors(found)
    adapter = Adapter(tensors, method.rank, method.alpha or method.rank)
    return TrainedAdapter(adapter, adapters.other_tensors(found))
