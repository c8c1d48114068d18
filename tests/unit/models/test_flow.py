# SPDX-License-Identifier: Apache-2.0
"""Noise levels and targets agree with diffusers and with the formulas they come from."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from fastvideo.config.train import Timesteps
from fastvideo.models.family import Interval
from fastvideo.models.flow import (
    NUM_TRAIN_TIMESTEPS,
    loss_per_sample,
    loss_weight,
    noised,
    sigma_at,
)

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


@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_shift_is_that_of_wans_sampler(shift: float) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(20)
    plain = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    plain.set_timesteps(20)
    found = sigma_at(plain.sigmas[:-1], Timesteps(), shift=shift)  # the last is 0
    torch.testing.assert_close(found, scheduler.sigmas[:-1], rtol=1e-6, atol=1e-7)


DENSITIES = [
    Timesteps(),
    Timesteps(density="logit_normal", logit_mean=-0.4, logit_std=1.3),
    Timesteps(density="mode", mode_scale=1.29),
    Timesteps(density="mode", mode_scale=-1.0),
]


@pytest.mark.parametrize("timesteps", DENSITIES, ids=lambda t: f"{t.density}{t.mode_scale}")
def test_every_density_grows_with_u_from_end_to_end(timesteps: Timesteps) -> None:
    sigma = sigma_at(U, timesteps, shift=3.0)
    assert bool((sigma.diff() > 0).all())
    assert sigma[0] < 0.05 and sigma[-1] > 0.99


@pytest.mark.parametrize("timesteps", DENSITIES, ids=lambda t: f"{t.density}{t.mode_scale}")
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_an_interval_cuts_the_density_and_keeps_its_shape(
    timesteps: Timesteps, shift: float, boundary: float
) -> None:
    """The quantiles within an interval are those of the whole density's part in it."""
    whole = sigma_at(torch.linspace(1e-5, 1 - 1e-5, 400_001), timesteps, shift=shift)
    parts = {
        Interval(low=boundary): whole[whole >= boundary],
        Interval(high=boundary): whole[whole < boundary],
    }
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for interval, part in parts.items():
        places = (quantiles * (len(part) - 1)).round().long()
        found = sigma_at(quantiles, timesteps, shift=shift, interval=interval)
        torch.testing.assert_close(found, part.sort().values[places], atol=1e-3, rtol=0)


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.417, 1 / 3])
def test_experts_meet_without_gap_or_overlap(boundary: float) -> None:
    """As float32 timesteps, compared as the pipelines compare them."""
    ends = torch.tensor([0.0, 1e-12, 1 - 1e-12, 1.0], dtype=torch.float64)
    high = sigma_at(ends, Timesteps(), shift=5.0, interval=Interval(low=boundary))
    low = sigma_at(ends, Timesteps(), shift=5.0, interval=Interval(high=boundary))
    assert high.dtype == low.dtype == torch.float32
    assert bool((high * NUM_TRAIN_TIMESTEPS >= boundary * NUM_TRAIN_TIMESTEPS).all())
    assert bool((low * NUM_TRAIN_TIMESTEPS < boundary * NUM_TRAIN_TIMESTEPS).all())
    below = torch.nextafter(high.min(), torch.tensor(0.0))
    assert low.max() <= below and below - low.max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_are_those_of_diffusers(weighting: str) -> None:
    sigma = torch.linspace(0.01, 0.99, 99)
    expected = compute_loss_weighting_for_sd3(weighting_scheme=weighting, sigmas=sigma)
    timesteps = Timesteps.model_validate({"weighting": weighting})
    torch.testing.assert_close(loss_weight(sigma, timesteps), expected, rtol=1e-6, atol=0)


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


def test_clean_frames_stay_out_of_the_loss() -> None:
    latents, noise = torch.randn(2, 2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction = noise - latents
    prediction[:, :, 0] += 9
    assert torch.equal(loss_per_sample(prediction, latents, noise, clean_frames=1), torch.zeros(2))
    prediction[:, :, 1:] += 0.5
    found = loss_per_sample(prediction, latents, noise, clean_frames=1)
    torch.testing.assert_close(found, torch.full((2,), 0.25))
