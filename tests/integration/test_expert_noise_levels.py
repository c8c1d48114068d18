# SPDX-License-Identifier: Apache-2.0
"""Wan2.2 A14B: the noise levels that each expert draws, with the checkpoint's own boundary.

Axes: N draws.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastvideo import state
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Timesteps
from fastvideo.data.loader import Place
from fastvideo.models.family import find_family
from fastvideo.models.flow import sigma_at
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from fastvideo.train import inputs, worker
from fastvideo.train.draw import Draw
from tests.tiny_world import Pair, World, in_fork, make_world

HIGH, LOW = "transformer", "transformer_2"
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}
DENSITIES = ("uniform", "logit_normal", "mode")
SHIFTS = (1.0, 3.0, 12.0)
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Preprocessed jobs by task."""
    return {task: world_of(task, tmp_path_factory.mktemp(task)) for task in BOUNDARIES}


def world_of(task: str, root: Path) -> World:
    write_tiny(root / "model", family="wan2.2-a14b", task=task)
    pair = Pair("wan2.2-a14b", task)
    world = make_world(root, clips=3, heldout=1, model=root / "model", pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


def draw_of(recipe: Recipe, folder: str) -> Draw:
    """What the training of one expert draws its samples with."""
    store = ShardStore(recipe.shards.path)
    plan = state.complete_plan(store)
    about = inputs.facts(recipe, store, plan)[folder]
    columns = find_family(recipe).columns(Path(recipe.model.path))
    return worker._draws(recipe, plan, columns=columns, about=about)[0]


def rejection_sample(timesteps: Timesteps, *, shift: float, low: float, high: float) -> Floats:
    """Noise levels of the whole range (Esser et al., 2024), those outside thrown away."""
    random = np.random.default_rng(0)
    u = random.random(1_000_000)
    if timesteps.density == "logit_normal":
        normal = timesteps.logit_mean + timesteps.logit_std * random.standard_normal(u.size)
        u = 1 / (1 + np.exp(-normal))
    elif timesteps.density == "mode":
        u = 1 - u - timesteps.mode_scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    sigma = shift * u / (1 + (shift - 1) * u)
    kept: Floats = np.sort(sigma[(sigma >= low) & (sigma < high)])
    return kept


def distance(found: Floats, expected: Floats) -> float:
    """Largest difference of the two distribution functions (Kolmogorov and Smirnov)."""
    places = np.sort(found)
    theirs = np.searchsorted(expected, places) / len(expected)
    ours = np.arange(len(places)) / len(places)
    return float(max(np.abs(ours - theirs).max(), np.abs(ours + 1 / len(places) - theirs).max()))


def on_its_side(timestep_N: torch.Tensor, folder: str, boundary: float) -> bool:
    """As the pipeline chooses an expert, step by step."""
    assert timestep_N.dtype == torch.float32
    is_high = [bool(t >= boundary * 1000) for t in timestep_N]
    return all(is_high) if folder == HIGH else not any(is_high)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("task", BOUNDARIES)
def test_each_expert_draws_the_density_cut_to_its_interval(
    worlds: dict[str, World], task: str, density: str
) -> None:
    boundary, draws = BOUNDARIES[task], 500
    timesteps = Timesteps(density=density)  # type: ignore[arg-type]  # pydantic checks it
    for shift in SHIFTS:
        recipe = worlds[task].load(
            f"train.timesteps.density={density}", f"train.timesteps.shift={shift}"
        )
        for folder in (HIGH, LOW):
            draw = draw_of(recipe, folder)
            assert draw.shift == shift
            drawn = [draw.training(Place(n // 3, n % 3)).sigma for n in range(draws)]
            held = [draw.heldout(0, quantile=q).sigma for q in (1e-9, 0.3, 1 - 1e-9)]
            sigma_N = torch.stack(drawn)
            assert on_its_side(torch.cat([sigma_N, torch.stack(held)]) * 1000, folder, boundary)
            interval = (boundary, 1.0) if folder == HIGH else (0.0, boundary)
            assert (draw.interval.low, draw.interval.high) == interval
            expected = rejection_sample(timesteps, shift=shift, low=interval[0], high=interval[1])
            # A thousandth of true samples lie further away than the first bound.
            assert distance(sigma_N.double().numpy(), expected) < 1.95 / draws**0.5
            even = sigma_at(
                (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000,
                timesteps,
                shift=shift,
                interval=draw.interval,
            )
            assert distance(even.double().numpy(), expected) < 0.02


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.417, 0.1, 1 / 3])
@pytest.mark.parametrize("density", DENSITIES)
def test_the_ends_of_an_interval_lie_on_its_side_of_the_boundary(
    worlds: dict[str, World], density: str, boundary: float
) -> None:
    """Also the smallest and the largest numbers that are drawn, and those next to the boundary."""
    ends = torch.tensor([0.0, 2.0**-53, 1e-12, 1 - 1e-12, 1 - 2.0**-53], dtype=torch.float64)
    timesteps = Timesteps(density=density)  # type: ignore[arg-type]
    for shift in SHIFTS:
        for folder in (HIGH, LOW):
            whole = draw_of(worlds["t2v"].load(), folder).interval
            low, high = (boundary if end == 0.875 else end for end in (whole.low, whole.high))
            interval = dataclasses.replace(whole, low=low, high=high)
            sigma_N = sigma_at(ends, timesteps, shift=shift, interval=interval)
            assert on_its_side(sigma_N * 1000, folder, boundary)
