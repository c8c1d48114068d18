# SPDX-License-Identifier: Apache-2.0
"""The randomness of a training sample: a function of (seed, epoch, sample index) and nothing else.

So noise, timestep, dropout and caption do not depend on the number of processes, on workers or on
restarts. Axes: B batch, C channels, T/Y/X latent frames, rows, columns, L text tokens, D dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvideo import hashing
from fastvideo.config.train import Timesteps
from fastvideo.data.loader import Place, Sample, Samples
from fastvideo.models.family import Batch, Interval, LatentStatistics, Text
from fastvideo.models.flow import sigma_at


@dataclass(frozen=True)
class Drawn:
    """A sample ready to train on, float32; latent and noise (C, T, Y, X), images as in `Sample`."""

    latent: Tensor
    noise: Tensor
    sigma: Tensor
    text: Text
    images: Mapping[str, Tensor]
    seed: int = 0
    """Of what else is random while it is trained on, see ``fastvideo.models.adapters.Dropout``."""


@dataclass(frozen=True)
class Draw:
    """Makes samples of training and of the held-out loss."""

    samples: Samples
    statistics: LatentStatistics
    timesteps: Timesteps
    shift: float
    interval: Interval
    seed: int
    text_dropout: float
    empty_text: Text

    def training(self, place: Place) -> Drawn:
        """Draw caption, dropout, noise level and noise, in this order."""
        generator = torch.Generator()
        seed = hashing.seed_of(self.seed, "sample", place.epoch, place.index)
        generator.manual_seed(seed)
        sample = self.samples[place.index]
        caption, dropout, u = torch.rand(3, generator=generator, dtype=torch.float64)
        text = sample.texts[int(caption * len(sample.texts))]
        if dropout < self.text_dropout:
            text = self.empty_text
        return replace(self._drawn(sample, text, u, generator), seed=seed)

    def heldout(self, index: int, *, quantile: float) -> Drawn:
        """The first caption, a fixed quantile of the noise levels and fixed noise."""
        generator = torch.Generator()
        generator.manual_seed(hashing.seed_of(self.seed, "heldout", index, repr(quantile)))
        sample = self.samples[index]
        u = torch.tensor(quantile, dtype=torch.float64)
        return self._drawn(sample, sample.texts[0], u, generator)

    def _drawn(self, sample: Sample, text: Text, u: Tensor, generator: torch.Generator) -> Drawn:
        latent = self.statistics.normalise(sample.vae_latent.float())
        noise = torch.randn(latent.shape, generator=generator)
        sigma = sigma_at(u, self.timesteps, shift=self.shift, interval=self.interval)
        # stored in the encoder's dtype; the model decides in which it computes
        images = {name: image.float() for name, image in sample.images.items()}
        return Drawn(latent, noise, sigma, _map(Tensor.float, text), images)


def collate(drawn: Sequence[Drawn], *, device: str) -> Batch:
    """Stack samples and bring them to the device."""

    def put(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(
        latents=put(torch.stack([d.latent for d in drawn])),
        noise=put(torch.stack([d.noise for d in drawn])),
        sigma=put(torch.stack([d.sigma for d in drawn])),
        texts=tuple(_map(put, d.text) for d in drawn),
        images={
            name: put(torch.stack([d.images[name] for d in drawn])) for name in drawn[0].images
        },
    )


def _map(change: Callable[[Tensor], Tensor], text: Text) -> Text:
    return Text(change(text.embedding), None if text.pooled is None else change(text.pooled))
