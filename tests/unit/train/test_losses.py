# SPDX-License-Identifier: Apache-2.0
"""What counts in the loss: given frames do not, and weights do in training only."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Timesteps, Train
from fastvideo.data.loader import Place
from fastvideo.models.family import Batch, Text, find_family
from fastvideo.state import RunDir
from fastvideo.train import loop
from fastvideo.train.draw import Drawn
from fastvideo.train.worker import _losses

SIGMA = 0.25
TEXT = Text(torch.zeros(1, 8))


# ---------------------------------------------------------------- given frames


def recipe_of(task: str) -> Recipe:
    tree = {
        "model": {"family": "wan2.2-ti2v-5b", "task": task, "path": "model"},
        "clip": {"num_frames": 9, "height": 64, "width": 64},
        "source": {"kind": "merged", "path": "clips"},
        "shards": {"path": "shards"},
        "run_dir": "run",
    }
    return Recipe.parse(tree, origin="test")


@pytest.mark.parametrize(("task", "counts"), [("t2v", True), ("i2v", False)])
def test_the_first_frame_of_ti2v_counts_unless_it_is_given(
    task: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(task)
    family = find_family(recipe)
    latent, noise = torch.zeros(1, 48, 3, 4, 4), torch.ones(1, 48, 3, 4, 4)
    prediction = noise - latent
    prediction[:, :, 0] += 3  # wrong in the first frame only
    monkeypatch.setattr(type(family), "forward", lambda *_, **__: prediction)
    batch = Batch(latent, noise, torch.tensor([SIGMA]), (TEXT,), {})
    (loss,) = _losses(recipe, family)(nn.Identity(), batch)
    assert loss.item() == (3 if counts else 0)  # 3**2 in one frame of three


# ---------------------------------------------------------------- weights


class AtOneSigma:
    """Two samples, the same noise level whatever is asked for."""

    samples = range(2)

    def training(self, place: Place) -> Drawn:
        return Drawn(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), torch.tensor(SIGMA), TEXT, {})

    def heldout(self, index: int, *, quantile: float) -> Drawn:
        return self.training(Place(0, index))


class NoStop:
    """Nobody asks for a stop."""

    def reason(self) -> None:
        return None


def records(run_dir: Path, timesteps: Timesteps) -> list[dict[str, Any]]:
    """Metrics of one step with a loss of 1 for each sample."""
    model = nn.Linear(1, 1)

    def ones(model: nn.Module, batch: Batch) -> Tensor:
        return torch.ones_like(batch.sigma) + 0 * sum(p.sum() for p in model.parameters())

    train = Train.model_validate(
        {
            "steps": 1,
            "global_batch_size": 2,
            "micro_batch_size": 1,
            "dtype": "float32",
            "loader_workers": 0,
            "log_every_steps": 1,
            "timesteps": timesteps,
        }
    )
    job = loop.Job(
        train=train,
        directory=RunDir(run_dir).training(),
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        losses=ones,
        draw=AtOneSigma(),  # type: ignore[arg-type]
        heldout=AtOneSigma(),  # type: ignore[arg-type]
        device="cpu",
        stop=NoStop(),  # type: ignore[arg-type]
        about={},
    )
    loop.run(job, start=loop.Progressed(step=0, losses=(), measured=False))
    return [json.loads(line) for line in job.directory.metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("none", 1), ("sigma_sqrt", SIGMA**-2), ("cosmap", 2 / (math.pi * 0.625))],
)
def test_weights_count_in_training_and_never_in_held_out_losses(
    weighting: str, weight: float, tmp_path: Path
) -> None:
    found = records(tmp_path, Timesteps.model_validate({"weighting": weighting}))
    assert [r["loss"] for r in found if "loss" in r] == [pytest.approx(weight)]
    assert [r["heldout_loss"] for r in found if "heldout_loss" in r] == [1, 1]
