# SPDX-License-Identifier: Apache-2.0
"""A transformer that trains in the place of its own in a diffusers pipeline.

The pipelines run as they are: scheduler, guidance, experts, first images and decoding are theirs.
What they call has our forward (``Family.attach``), weights that may be sharded, and perhaps only a
part of the tokens; and prompts come encoded, so that no text or image encoder is loaded.

Axes: B batch, C channels, T/Y/X latent frames, rows, columns, N image tokens, D dimension.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class Denoiser(nn.Module):
    """What a pipeline asks of a transformer, answered by one that trains.

    That one is not a submodule: a pipeline that is moved leaves it where it is.
    """

    dtype = torch.float32
    """Of the weights and of what the pipeline gives, as in training."""

    def __init__(self, model: nn.Module, *, device: str, compute: str) -> None:
        """Stand for a model.

        Args:
            model: With our forward.
            device: Where it computes, whatever holds its weights.
            compute: Dtype of the products, by autocast as in training.
        """
        super().__init__()
        self._predict, self.config = model.__call__, model.config
        self.device = torch.device(device)
        self._compute: torch.dtype = getattr(torch, compute)

    def forward(self, *, return_dict: bool, attention_kwargs: None, **given: Any) -> tuple[Tensor]:
        """Predict the flow (B, C, T, Y, X); what the pipeline has none of is left out."""
        assert not return_dict and attention_kwargs is None
        arguments = {name: value for name, value in given.items() if value is not None}
        mixed = self._compute != self.dtype
        with torch.autocast(self.device.type, dtype=self._compute, enabled=mixed):
            return (self._predict(**arguments),)

    def cache_context(self, name: str, **about: Any) -> AbstractContextManager[None]:
        """Nothing is cached between steps."""
        return nullcontext()


def give_clip_feature(pipeline: DiffusionPipeline, feature_ND: Tensor) -> None:
    """Let the pipeline find these CLIP features, whatever the first image.

    It takes them as an argument only where it is given no image, which it needs for the VAE.
    """
    pipeline.encode_image = functools.partial(_given, feature_ND.unsqueeze(0))


def _given(feature_BND: Tensor, image: Any, device: torch.device) -> Tensor:
    return feature_BND.to(device)
