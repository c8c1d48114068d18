# SPDX-License-Identifier: Apache-2.0
"""The learning rate over the steps."""

import pytest
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from torch import nn
from torch.optim import SGD

from fastvideo.config.train import Schedule
from fastvideo.train.schedule import learning_rate_factor


def test_warmup_grows_in_equal_parts_to_the_peak() -> None:
    schedule = Schedule(warmup_steps=4)
    found = [learning_rate_factor(step, schedule, steps=10) for step in range(6)]
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_is_that_of_the_common_schedules(kind: str) -> None:
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    optimizer = SGD([nn.Parameter()], lr=1.0)
    reference = make[kind](optimizer, num_warmup_steps=5, num_training_steps=50)
    schedule = Schedule(kind=kind, warmup_steps=5)  # type: ignore[arg-type]
    for step in range(5, 50):
        expected = reference.lr_lambdas[0](step)
        assert learning_rate_factor(step, schedule, steps=50) == pytest.approx(expected), step


def test_decay_ends_at_the_given_share() -> None:
    schedule = Schedule(kind="cosine", min_lr_ratio=0.1)
    assert learning_rate_factor(1000, schedule, steps=1000) == pytest.approx(0.1)
