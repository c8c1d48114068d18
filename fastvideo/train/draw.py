# SPDX-License-Identifier: Apache-2.0
"""The randomness of a training sample: a function of (seed, epoch, sample index) and nothing else.

So noise, timestep, dropout and caption do not depend on the number of processes, on workers or on
restarts. Axes: B batch, C channels, T/Y/X latent frames, rows, columns, L text tokens, D dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo import hashing
from fastvideo.config.train import Timesteps
from fastvideo.data.loader import Place, Sample, Samples
from fastvideo.models.family import LatentStatistics
from fastvideo.models.flow import sigma_at


@dataclass(frozen=True)
class Drawn:
    """A sample ready to train on; latent and noise (C, T, Y, X) float32, text (L, D) float32."""

    latent: Tensor
    noise: Tensor
    sigma: Tensor
    text: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples on the device: (B, C, T, Y, X) float32, sigma (B,) float32, text one by one."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    texts: tuple[Tensor, ...]


@dataclass(frozen=True)
class Draw:
    """Makes samples of training and of the held-out loss."""

    samples: Samples
    statistics: LatentStatistics
    timesteps: Timesteps
    shift: float
    seed: int
    text_dropout: float
    empty_text: Tensor

    def training(self, place: Place) -> Drawn:
        """Draw caption, dropout, noise level and noise, in this order."""
        generator = torch.Generator()
        generator.manual_seed(hashing.seed_of(self.seed, "sample", place.epoch, place.index))
        sample = self.samples[place.index]
        caption, dropout, u = torch.rand(3, generator=generator, dtype=torch.float64)
        text = sample.texts[int(caption * len(sample.texts))]
        if dropout < self.text_dropout:
            text = self.empty_text
        return self._drawn(sample, text, u, generator)

    def heldout(self, index: int, *, quantile: float) -> Drawn:
        """The first caption, a fixed quantile of the noise levels and fixed noise."""
        generator = torch.Generator()
        generator.manual_seed(hashing.seed_of(self.seed, "heldout", index, repr(quantile)))
        sample = self.samples[index]
        u = torch.tensor(quantile, dtype=torch.float64)
        return self._drawn(sample, sample.texts[0], u, generator)

    def _drawn(self, sample: Sample, text: Tensor, u: Tensor, generator: torch.Generator) -> Drawn:
        latent = self.statistics.normalise(sample.vae_latent.float())
        noise = torch.randn(latent.shape, generator=generator)
        sigma = sigma_at(u, self.timesteps, shift=self.shift)
        # stored in the encoder's dtype; the model decides in which it computes
        return Drawn(latent, noise, sigma, text.float())


def collate(drawn: Sequence[Drawn], *, device: str) -> Batch:
    """Stack samples and bring them to the device."""
    return Batch(
        latents=torch.stack([d.latent for d in drawn]).to(device, non_blocking=True),
        noise=torch.stack([d.noise for d in drawn]).to(device, non_blocking=True),
        sigma=torch.stack([d.sigma for d in drawn]).to(device, non_blocking=True),
        texts=tuple(d.text.to(device, non_blocking=True) for d in drawn),
    )
