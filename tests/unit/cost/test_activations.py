# SPDX-License-Identifier: Apache-2.0
"""Activation bytes against real forward passes of every tiny model, under every policy."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo.cost.activations import Kernels, Policy, Saved, saved
from fastvideo.cost.layers import Tokens
from fastvideo.models import hunyuan_forward, wan_forward
from fastvideo.models.execution import Execution
from fastvideo.models.sequence import SequenceParallel
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.ranks import in_ranks
from tests.saved_memory import alive_after, kept_by_autograd, rules_of_gpus
from tests.tiny_models import build, inputs, tokens
from tests.tiny_world import PAIRS, Pair

SHAPES = [(2, 3, 16, 12), (1, 5, 16, 16)]
"""(B, T, Y, X) of latents."""
TOLERANCE = 0.001
"""The issue asks for 5 %; what is counted is exact but for statistics of a norm in bfloat16."""
ARCHITECTURES = list({str(TRANSFORMERS[p.family, p.task]): p for p in reversed(PAIRS)}.values())
"""One twin of each configuration."""
every_architecture = pytest.mark.parametrize("pair", ARCHITECTURES, ids=str)
every_twin = pytest.mark.parametrize("pair", PAIRS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def forward(pair: Pair, model: nn.Module, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    """A forward pass whose inputs nobody else holds."""

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            out: Tensor = model(**inputs(pair, shape))
        return out

    return run


def functions(pair: Pair) -> Any:
    return hunyuan_forward if pair.family == "hunyuan-video" else wan_forward


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    for part in parts if not isinstance(value, Tensor) else ():
        yield from tensors_in(part)


def attached(pair: Pair, policy: Policy) -> nn.Module:
    model = build(pair)
    functions(pair).attach(model, Execution(recompute=policy))
    return model


def expected(pair: Pair, shape: tuple[int, ...], policy: Policy, kernels: Kernels) -> Saved:
    config = TRANSFORMERS[pair.family, pair.task]
    return saved(config, pair.family, tokens(pair, shape), policy=policy, kernels=kernels)


@every_shape
@every_dtype
@every_twin
def test_without_checkpointing_it_is_what_hooks_see(
    pair: Pair, dtype: str, shape: tuple[int, ...]
) -> None:
    model = attached(pair, "none")
    measured = kept_by_autograd(forward(pair, model, shape, dtype), model)
    found = expected(pair, shape, "none", Kernels(dtype, gpu=False))
    assert found.block == 0
    assert found.forward == pytest.approx(measured, rel=TOLERANCE)


@every_dtype
@every_architecture
def test_gpus_have_rules_of_their_own(pair: Pair, dtype: str) -> None:
    model = attached(pair, "none")
    with rules_of_gpus():
        measured = kept_by_autograd(forward(pair, model, SHAPES[1], dtype), model)
    found = expected(pair, SHAPES[1], "none", Kernels(dtype, gpu=True))
    assert found.forward == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@every_dtype
@every_architecture
def test_it_is_what_is_alive_between_forward_and_backward(
    pair: Pair, dtype: str, policy: Policy
) -> None:
    model = attached(pair, policy)
    measured = alive_after(forward(pair, model, SHAPES[0], dtype), model)
    found = expected(pair, SHAPES[0], policy, Kernels(dtype, gpu=False))
    assert found.forward == pytest.approx(measured, rel=TOLERANCE)


@every_dtype
@every_architecture
def test_a_block_computed_again_takes_what_it_leaves_when_run_alone(pair: Pair, dtype: str) -> None:
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def run(layer: nn.Module, *arguments: Any) -> Any:
        calls.append((layer, arguments))
        return layer(*arguments)

    model = attached(pair, "none")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        functions(pair).forward(model, **inputs(pair, SHAPES[0]), run=run)
    measured = []
    for layer, arguments in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            again = functools.partial(layer, *arguments)
            measured.append(alive_after(again, model, given=tensors_in(arguments)))
    found = expected(pair, SHAPES[0], "full", Kernels(dtype, gpu=False))
    assert found.block == pytest.approx(max(measured), rel=TOLERANCE)


@every_architecture
def test_each_policy_keeps_less_than_the_one_before(pair: Pair) -> None:
    config = TRANSFORMERS[pair.family, pair.task]
    name = "num_single_layers" if pair.family == "hunyuan-video" else "num_layers"
    deep = {**config, name: 20}
    peaks = [
        saved(deep, pair.family, tokens(pair, SHAPES[0]), policy=policy).peak
        for policy in ("full", "selective", "none")
    ]
    assert peaks == sorted(peaks) and peaks[0] < peaks[1] < peaks[2]


@every_architecture
def test_processes_that_share_a_sample_hold_their_part(pair: Pair) -> None:
    """What grows with the tokens is halved; the text, the angles and one copy more are not."""
    config = TRANSFORMERS[pair.family, pair.task]
    long = Tokens(video=4001, text=16, image=tokens(pair, SHAPES[0]).image, batch=1)
    whole = saved(config, pair.family, long).forward
    half = saved(config, pair.family, long, sequence=2).forward
    assert 0.5 < half / whole < 0.6


def kept_by_one_of_several(rank: int) -> dict[tuple[str, str], int]:
    """Of each architecture in each dtype, by the rules of GPUs."""
    found = {}
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    for pair in ARCHITECTURES:
        for dtype in ("float32", "bfloat16"):
            model = build(pair)
            functions(pair).attach(model, Execution(sequence=SequenceParallel(group)))
            with rules_of_gpus():
                kept = kept_by_autograd(forward(pair, model, SHAPES[0], dtype), model)
            found[str(pair), dtype] = kept
    return found


def test_two_processes_keep_what_is_counted_of_one_that_shares() -> None:
    """The largest difference, 0.9 %, is of HunyuanVideo in float32."""
    for measured in in_ranks(2, kept_by_one_of_several):
        for pair in ARCHITECTURES:
            config = TRANSFORMERS[pair.family, pair.task]
            for dtype in ("float32", "bfloat16"):
                kernels = Kernels(dtype, gpu=True)
                given = tokens(pair, SHAPES[0])
                found = saved(config, pair.family, given, sequence=2, kernels=kernels).forward
                kept = measured[str(pair), dtype]
                assert found == pytest.approx(kept, rel=0.01), (pair, dtype)
