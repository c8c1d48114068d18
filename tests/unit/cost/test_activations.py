# SPDX-License-Identifier: Apache-2.0
"""Activation bytes against real forward passes of every tiny model: equal, under every policy."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvideo.config.train import Full, Lora
from fastvideo.cost.activations import Computation, Policy, Saved, saved
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import FULL
from fastvideo.models.execution import Execution
from fastvideo.models.sequence import SequenceParallel
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.ranks import in_ranks
from tests.saved_memory import alive_after, kept_by_autograd, rules_of_gpus
from tests.tiny_models import ARCHITECTURES, attached, forward, functions, inputs, tokens
from tests.tiny_world import PAIRS, Pair

SHAPES = [(2, 3, 16, 12), (1, 5, 16, 16)]
"""(B, T, Y, X) of latents."""
METHODS: dict[str, Full | Lora] = {"full": FULL, "lora": Lora(rank=4)}
every_architecture = pytest.mark.parametrize("pair", ARCHITECTURES, ids=str)
every_twin = pytest.mark.parametrize("pair", PAIRS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    for part in parts if not isinstance(value, Tensor) else ():
        yield from tensors_in(part)


def expected(
    pair: Pair, shape: tuple[int, ...], how: Computation, method: Full | Lora = FULL
) -> Saved:
    config, given = TRANSFORMERS[pair.family, pair.task], tokens(pair, shape)
    return saved(config, pair.family, given, method=method, how=how)


@every_shape
@every_dtype
@every_twin
def test_without_checkpointing_it_is_what_hooks_see(
    pair: Pair, dtype: str, shape: tuple[int, ...]
) -> None:
    model = attached(pair, "none")
    measured = kept_by_autograd(forward(pair, model, shape, dtype), model)
    found = expected(pair, shape, Computation(dtype, gpu=False))
    assert found.block == 0
    assert found.forward == measured


@every_dtype
@every_architecture
def test_gpus_have_rules_of_their_own(pair: Pair, dtype: str) -> None:
    model = attached(pair, "none")
    with rules_of_gpus():
        measured = kept_by_autograd(forward(pair, model, SHAPES[1], dtype), model)
    found = expected(pair, SHAPES[1], Computation(dtype, gpu=True))
    assert found.forward == measured


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@every_dtype
@every_architecture
def test_it_is_what_is_alive_between_forward_and_backward(
    pair: Pair, dtype: str, policy: Policy
) -> None:
    model = attached(pair, policy)
    measured = alive_after(forward(pair, model, SHAPES[0], dtype), model)
    found = expected(pair, SHAPES[0], Computation(dtype, gpu=False, policy=policy))
    assert found.forward == measured


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@every_dtype
@every_architecture
def test_a_block_computed_again_takes_what_it_leaves_when_run_alone(
    pair: Pair, dtype: str, method: Full | Lora
) -> None:
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def run(layer: nn.Module, *arguments: Any) -> Any:
        calls.append((layer, arguments))
        return layer(*arguments)

    model = attached(pair, "none", method=method, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        functions(pair).forward(model, **inputs(pair, SHAPES[0]), run=run)
    measured = []
    for layer, arguments in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            again = functools.partial(layer, *arguments)
            measured.append(alive_after(again, model, given=tensors_in(arguments)))
    found = expected(pair, SHAPES[0], Computation(dtype, gpu=False, policy="full"), method)
    assert found.block == max(measured)


@every_architecture
def test_each_policy_keeps_less_than_the_one_before(pair: Pair) -> None:
    config = TRANSFORMERS[pair.family, pair.task]
    name = "num_single_layers" if pair.family == "hunyuan-video" else "num_layers"
    deep = {**config, name: 20}
    peaks = [
        saved(deep, pair.family, tokens(pair, SHAPES[0]), how=Computation(policy=policy)).peak
        for policy in ("full", "selective", "none")
    ]
    assert peaks == sorted(peaks) and peaks[0] < peaks[1] < peaks[2]


@every_architecture
def test_processes_that_share_a_sample_hold_their_part(pair: Pair) -> None:
    """What grows with the tokens is halved; the text, the angles and one copy more are not."""
    config = TRANSFORMERS[pair.family, pair.task]
    long = Tokens(video=4001, text=16, image=tokens(pair, SHAPES[0]).image, batch=1)
    whole = saved(config, pair.family, long).forward
    half = saved(config, pair.family, long, how=Computation(sequence=2)).forward
    assert 0.5 < half / whole < 0.6


def kept_by_one_of_several(rank: int) -> dict[tuple[str, str, str], int]:
    """Of each architecture, method and dtype, by the rules of GPUs."""
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    found = {}
    for pair, kind, dtype in itertools.product(ARCHITECTURES, METHODS, ("float32", "bfloat16")):
        model = attached(pair, method=METHODS[kind], dtype=dtype)
        functions(pair).attach(model, Execution(sequence=SequenceParallel(group)))
        with rules_of_gpus():
            kept = kept_by_autograd(forward(pair, model, SHAPES[0], dtype), model)
        found[str(pair), kind, dtype] = kept
    return found


def test_two_processes_keep_what_is_counted_of_one_that_shares() -> None:
    """The largest difference is of HunyuanVideo in float32."""
    for measured in in_ranks(2, kept_by_one_of_several):
        for pair, kind, dtype in itertools.product(ARCHITECTURES, METHODS, ("float32", "bfloat16")):
            how = Computation(dtype, sequence=2)
            found = expected(pair, SHAPES[0], how, METHODS[kind]).forward
            kept = measured[str(pair), kind, dtype]
            assert found == pytest.approx(kept, rel=0.01), (pair, kind, dtype, found / kept)
