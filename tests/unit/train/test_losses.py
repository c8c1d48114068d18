# SPDX-License-Identifier: Apache-2.0
"""What counts in the loss: given frames do not, and weights do in training only."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.checkpoint import Saved
from fastvideo.config.parallel import Parallel
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Timesteps, Train
from fastvideo.cost.layout import Layout
from fastvideo.data.loader import Place
from fastvideo.models.family import Batch, Text, find_family
from fastvideo.state import RunDir
from fastvideo.train import loop
from fastvideo.train.draw import Drawn
from fastvideo.train.method import FullFinetune
from fastvideo.train.parallel import Runner, Team
from fastvideo.train.process import Process
from fastvideo.train.throughput import Work
from fastvideo.train.worker import losses_of
from tests.ranks import NoStop, Silent

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
def test_the_first_frame_of_ti2v_counts_unless_it_is_given(task: str, counts: bool) -> None:
    family = find_family(recipe_of(task))
    latent, noise = torch.zeros(1, 48, 3, 4, 4), torch.ones(1, 48, 3, 4, 4)
    prediction = noise - latent
    prediction[:, :, 0] += 3  # wrong in the first frame only
    batch = Batch(latent, noise, torch.tensor([SIGMA]), (TEXT,), {})
    (loss,) = losses_of(family, lambda arguments: prediction)(batch)
    assert loss.item() == (3 if counts else 0)  # 3**2 in one frame of three


# ---------------------------------------------------------------- weights


class TwoClips:
    """As much of `Samples` as the order of a step needs."""

    shapes = ((4, 1, 2, 2),) * 2

    def __len__(self) -> int:
        return 2

    def id(self, index: int) -> str:
        return str(index)


class AtOneSigma:
    """Two samples, the same noise level whatever is asked for."""

    samples = TwoClips()

    def training(self, place: Place) -> Drawn:
        return Drawn(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), torch.tensor(SIGMA), TEXT, {})

    def heldout(self, index: int, *, quantile: float) -> Drawn:
        return self.training(Place(0, index))


def records(run_dir: Path, timesteps: Timesteps) -> list[dict[str, Any]]:
    """Metrics of one step with a loss of 1 for each sample."""
    model = nn.Linear(1, 1)

    def ones(batch: Batch) -> Tensor:
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
    team = Team(Process(NoStop(), Silent()), Layout(1, 1, 1, ""), "cpu")
    job = loop.Job(
        train=train,
        directory=RunDir(run_dir).training(),
        team=team,
        saved=Saved(model, torch.optim.AdamW(model.parameters())),
        runner=Runner(model, team, Parallel()),
        losses=ones,
        draw=AtOneSigma(),  # type: ignore[arg-type]
        heldout=AtOneSigma(),  # type: ignore[arg-type]
        method=FullFinetune(),
    )
    start = loop.Progressed(step=0, losses=(), measured=False, watch=None)
    work = Work(2, 4, 1.0, 1.0, 1, "cpu", "float32")
    loop.run(job, start=start, work=work, about={})
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
