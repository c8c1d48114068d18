# SPDX-License-Identifier: Apache-2.0
"""Flow matching: noise levels, noised latents, targets and the loss, in float32.

Notation: x0 a normalised latent, eps unit normal noise, sigma in (0, 1) the noise level:
``x_t = (1 - sigma) * x0 + sigma * eps``, the model predicts ``eps - x0`` (Lipman et al., 2023).
"""

import torch
from torch import Tensor

from fastvideo.config.train import Timesteps

NUM_TRAIN_TIMESTEPS = 1000
"""The models' timestep is sigma times this."""


def sigma_at(u: Tensor, timesteps: Timesteps, *, shift: float) -> Tensor:
    """Map uniform ``u`` in (0, 1) to noise levels of the chosen density, then shift them.

    Every density is a function of one uniform number, so that fixed quantiles and random draws use
    the same code. Densities: Esser et al., 2024, section 3.1; shift: ibid., section 5.3.2, as Wan
    and HunyuanVideo apply it in their samplers.

    Args:
        u: Any shape, float64 or float32.
        timesteps: Which density.
        shift: ``sigma = shift * u / (1 + (shift - 1) * u)``; 1 leaves it as it is.

    Returns:
        float32 of the shape of ``u``.
    """
    u = u.double()
    if timesteps.density == "logit_normal":
        u = torch.sigmoid(timesteps.logit_mean + timesteps.logit_std * torch.special.ndtri(u))
    elif timesteps.density == "mode":
        u = 1 - u - timesteps.mode_scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    return (shift * u / (1 + (shift - 1) * u)).float()


def noised(latents_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """Return ``x_t`` for the normalised latents, shapes and dtype as given."""
    sigma = sigma_B.view(-1, *[1] * (latents_BCTHW.ndim - 1))
    return (1 - sigma) * latents_BCTHW + sigma * noise_BCTHW


def loss_per_sample(prediction_BCTHW: Tensor, latents_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Mean squared error against ``eps - x0`` of each sample, float32 (B,)."""
    error = prediction_BCTHW.float() - (noise_BCTHW.float() - latents_BCTHW.float())
    return error.square().flatten(1).mean(1)
