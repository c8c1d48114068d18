# SPDX-License-Identifier: Apache-2.0
"""Flow matching: noise levels, noised latents, targets and the loss, in float32.

Notation: x0 a normalised latent, eps unit normal noise, sigma in (0, 1) the noise level:
``x_t = (1 - sigma) * x0 + sigma * eps``, the model predicts ``eps - x0`` (Lipman et al., 2023).
"""

import functools
import math

import torch
from torch import Tensor

from fastvideo.config.train import Timesteps
from fastvideo.models.family import Interval

NUM_TRAIN_TIMESTEPS = 1000
"""The models' timestep is sigma times this."""


WHOLE = Interval()


def sigma_at(
    u: Tensor, timesteps: Timesteps, *, shift: float, interval: Interval = WHOLE
) -> Tensor:
    """Map uniform ``u`` in (0, 1) to noise levels of the chosen density, shifted, in an interval.

    Every density is a growing function of one uniform number, so that fixed quantiles and random
    draws use the same code, and so that the density within an interval is exact, without trying
    again: ``u`` is mapped to the part of (0, 1) that lands there. Densities: Esser et al., 2024,
    section 3.1; shift: ibid., section 5.3.2, as Wan and HunyuanVideo apply it in their samplers.

    Args:
        u: Any shape, float64 or float32.
        timesteps: Which density.
        shift: ``sigma = shift * u / (1 + (shift - 1) * u)``; 1 leaves it as it is.
        interval: Noise levels of one expert, after the shift.

    Returns:
        float32 of the shape of ``u``; as timesteps on the right side of the expert's boundary.
    """
    low, high = _uniform_range(timesteps, shift, interval)
    sigma = _shifted(low + (high - low) * u.double(), timesteps, shift).float()
    least = _first_at(interval.low) if interval.low > 0 else 0.0
    most = _last_below(interval.high) if interval.high < 1 else 1.0
    return sigma.clamp(least, most)


def loss_weight(sigma_B: Tensor, timesteps: Timesteps) -> Tensor:
    """Weight of each sample's loss (B,), float32 (Esser et al., 2024, section 3.1)."""
    if timesteps.weighting == "sigma_sqrt":
        return sigma_B**-2
    if timesteps.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B**2))
    return torch.ones_like(sigma_B)


def noised(latents_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Return ``x_t`` for the normalised latents, shapes and dtype as given."""
    sigma = sigma_B.view(-1, *[1] * (latents_BCTHW.ndim - 1))
    return (1 - sigma) * latents_BCTHW + sigma * noise_BCTHW


def loss_per_sample(
    prediction_BCTHW: Tensor,
    latents_BCTHW: Tensor,
    noise_BCTHW: Tensor,
    *,
    clean_frames: int = 0,
) -> Tensor:
    """Mean squared error against ``eps - x0`` of each sample, float32 (B,).

    The first ``clean_frames`` latent frames were given to the model and are left out.
    """
    error = prediction_BCTHW.float() - (noise_BCTHW.float() - latents_BCTHW.float())
    return error[:, :, clean_frames:].square().flatten(1).mean(1)


def _shifted(u: Tensor, timesteps: Timesteps, shift: float) -> Tensor:
    """Noise levels (float64) that grow with ``u``."""
    if timesteps.density == "logit_normal":
        u = torch.sigmoid(timesteps.logit_mean + timesteps.logit_std * torch.special.ndtri(u))
    elif timesteps.density == "mode":
        u = u - timesteps.mode_scale * (torch.sin(torch.pi * u / 2) ** 2 - u)
    return shift * u / (1 + (shift - 1) * u)


@functools.cache
def _uniform_range(timesteps: Timesteps, shift: float, interval: Interval) -> tuple[float, float]:
    """The part of (0, 1) that ``_shifted`` maps into the interval, by bisection."""
    return tuple(  # type: ignore[return-value]  # two of them
        _inverse(sigma, timesteps, shift) if 0 < sigma < 1 else sigma
        for sigma in (interval.low, interval.high)
    )


def _inverse(sigma: float, timesteps: Timesteps, shift: float) -> float:
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if float(_shifted(torch.tensor(middle, dtype=torch.float64), timesteps, shift)) < sigma:
            low = middle
        else:
            high = middle
    return high


def _first_at(sigma: float) -> float:
    """The least float32 whose timestep, as samplers compare it, is not below the boundary's."""
    candidate = torch.tensor(sigma, dtype=torch.float32)
    while float(candidate * NUM_TRAIN_TIMESTEPS) < sigma * NUM_TRAIN_TIMESTEPS:
        candidate = torch.nextafter(candidate, torch.tensor(torch.inf))
    return float(candidate)


def _last_below(sigma: float) -> float:
    """The largest float32 whose timestep is below the boundary's."""
    candidate = torch.tensor(_first_at(sigma), dtype=torch.float32)
    while float(candidate * NUM_TRAIN_TIMESTEPS) >= sigma * NUM_TRAIN_TIMESTEPS:
        candidate = torch.nextafter(candidate, torch.tensor(-torch.inf))
    return float(candidate)
