# SPDX-License-Identifier: Apache-2.0
"""Processes that share samples compute what one computes: outputs, and gradients when summed."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo.models import hunyuan_forward, wan_forward
from fastvideo.models.execution import Execution
from fastvideo.models.sequence import SequenceParallel, frames_of
from tests.gradients import distances, gradients
from tests.ranks import in_ranks
from tests.unit.models import test_hunyuan_forward as hunyuan
from tests.unit.models import test_wan_forward as wan

TOLERANCE = 2e-6
SHAPE = (2, 5, 6, 6)
"""45 tokens, 9 of each latent frame: parts differ in size and cut frames."""
KINDS = [*wan.KINDS, "hunyuan"]


def model_and_inputs(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if kind == "hunyuan":
        return hunyuan.build(), hunyuan.inputs(shape=SHAPE, rows=21)
    return wan.build(kind), wan.inputs(kind, shape=SHAPE)


def run(model: Any, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given)
    return output


def computed(kind: str, how: Execution) -> dict[str, Tensor]:
    """Output and gradients of a weighted sum of it."""
    model, given = model_and_inputs(kind)
    rooms: Any = hunyuan_forward if kind == "hunyuan" else wan_forward
    rooms.attach(model, how)
    fixed = hunyuan.WHOLE_NUMBERS if kind == "hunyuan" else ("timestep",)
    found = gradients(run, model, given, fixed=fixed)
    with torch.no_grad():
        found["output"] = run(model, given)
    return found


def shared(kind: str, recompute: Any, rank: int) -> dict[str, Tensor]:
    found = computed(kind, Execution(recompute, sequence=SequenceParallel(dist.group.WORLD)))  # type: ignore[arg-type]
    for name, tensor in found.items():
        if name != "output":
            dist.all_reduce(tensor)
    return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(kind: str, recompute: Any) -> None:
    check(kind, 2, functools.partial(shared, kind, recompute))


@pytest.mark.parametrize("kind", ["timestep of each frame", "hunyuan"])
def test_four_processes_compute_what_one_does(kind: str) -> None:
    check(kind, 4, functools.partial(shared, kind, "none"))


def check(kind: str, count: int, action: Callable[[int], dict[str, Tensor]]) -> None:
    expected = computed(kind, Execution())
    for found in in_ranks(count, action):
        for name, apart in distances(found, expected).items():
            if kind == "hunyuan" and hunyuan.is_without_effect(name):
                continue
            assert apart <= TOLERANCE, name


def test_parts_cover_all_tokens_in_order_and_differ_by_one_at_most() -> None:
    def parts(rank: int) -> list[tuple[int, int]]:
        sequence = SequenceParallel(dist.group.WORLD)  # type: ignore[arg-type]
        assert sequence.part(45) == sequence.parts(45)[rank]
        return [(part.start, part.stop) for part in sequence.parts(45)]

    assert in_ranks(2, parts) == [[(0, 23), (23, 45)]] * 2


def test_the_frames_of_a_part_are_those_that_hold_its_tokens() -> None:
    assert frames_of(slice(7, 20), per_frame=9) == (slice(0, 3), slice(7, 20))
    assert frames_of(slice(9, 18), per_frame=9) == (slice(1, 2), slice(0, 9))
    assert frames_of(slice(17, 20), per_frame=9) == (slice(1, 3), slice(8, 11))
