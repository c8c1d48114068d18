# SPDX-License-Identifier: Apache-2.0
"""The held-out loss: clips that are not trained on, at fixed noise levels with fixed noise."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvideo.config.train import Heldout
from fastvideo.models.family import Batch
from fastvideo.train.draw import Draw, collate
from fastvideo.train.parallel import Team


@dataclass(frozen=True)
class Measured:
    """What was found."""

    clips: int
    by_quantile: list[float]
    """Mean loss over the clips at each quantile of the noise levels."""

    @property
    def mean(self) -> float:
        """Over all quantiles."""
        return sum(self.by_quantile) / len(self.by_quantile)


@torch.no_grad()
def measure(
    draw: Draw,
    spec: Heldout,
    *,
    losses: Callable[[Batch], Tensor],
    team: Team,
    step: int,
) -> Measured | None:
    """Mean loss over held-out clips, of which there are some; all processes call it together.

    Args:
        draw: Of the held-out clips.
        spec: How many clips and quantiles.
        losses: A batch to the loss of each sample, not weighted.
        team: Who measures: items are dealt out to its groups.
        step: Finished optimizer steps, for the signs of life.

    Returns:
        None if a stop was asked for before it was finished.
    """
    clips, count = min(len(draw.samples), spec.max_clips), spec.num_timesteps
    groups, ours = team.layout.data, team.place
    items = list(itertools.product(range(clips), range(count)))
    totals = torch.zeros(count, dtype=torch.float64)
    for first in range(0, len(items), groups):
        team.process.pulse.beat(step, "heldout")
        if any(team.any(team.process.stop.reason() is not None)):
            return None
        # All take part in each pass: one for which nothing is left repeats the last item.
        clip, place = items[min(first + ours, len(items) - 1)]
        drawn = draw.heldout(clip, quantile=(place + 0.5) / count)
        loss = float(losses(collate([drawn], device=team.device)))
        if first + ours < len(items):
            totals[place] += loss
    summed: list[float] = team.total(totals.to(team.device)).tolist()
    return Measured(clips, [total / clips for total in summed])
