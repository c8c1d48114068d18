# SPDX-License-Identifier: Apache-2.0
"""Noise levels and targets agree with diffusers and with the formulas they come from."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from fastvideo.config.train import Timesteps
from fastvideo.models.flow import loss_per_sample, noised, sigma_at

U = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)


def test_uniform_without_shift_is_the_identity() -> None:
    sigma = sigma_at(U, Timesteps(), shift=1.0)
    torch.testing.assert_close(sigma, U.float())
    assert sigma.dtype == torch.float32


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_shift_is_the_samplers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    unshifted = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas
    found = sigma_at(unshifted, Timesteps(), shift=shift)
    torch.testing.assert_close(found, scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Timesteps(), {"weighting_scheme": "none"}),
        (
            Timesteps(density="logit_normal", logit_mean=0.3, logit_std=0.7),
            {"weighting_scheme": "logit_normal", "logit_mean": 0.3, "logit_std": 0.7},
        ),
        (
            Timesteps(density="mode", mode_scale=1.29),
            {"weighting_scheme": "mode", "mode_scale": 1.29},
        ),
    ],
    ids=["uniform", "logit_normal", "mode"],
)
def test_densities_are_those_of_diffusers(ours: Timesteps, theirs: dict[str, object]) -> None:
    """Quantiles of a large sample of theirs against ours at evenly spaced u."""
    generator = torch.Generator().manual_seed(0)
    sample = compute_density_for_timestep_sampling(
        batch_size=200_000, generator=generator, **theirs
    )
    quantiles = torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])
    expected = sample.float().quantile(quantiles)
    found = sigma_at(torch.linspace(1e-4, 1 - 1e-4, 20_001), ours, shift=1.0).quantile(quantiles)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_noised_is_the_schedulers_interpolation() -> None:
    latents, noise = torch.randn(2, 4, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = scheduler.timesteps[[10, 300, 700, 990]]
    sigma = scheduler.sigmas[[10, 300, 700, 990]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(noised(latents, noise, sigma), expected, rtol=0, atol=0)


def test_loss_is_zero_for_the_true_flow_and_float32_for_any_dtype() -> None:
    latents, noise = torch.randn(2, 2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss_per_sample(noise - latents, latents, noise), torch.zeros(2))
    loss = loss_per_sample((noise - latents + 0.5).bfloat16(), latents, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 0.25), rtol=2e-2, atol=0)
