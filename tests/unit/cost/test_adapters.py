# SPDX-License-Identifier: Apache-2.0
"""Adapters: what autograd keeps and torch counts of real ones, peft's, is what is computed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvideo.config.train import Lora
from fastvideo.cost import flops
from fastvideo.cost.activations import Computation, Policy, Saved, saved
from fastvideo.cost.transformer import layers
from fastvideo.cost.walk import gradients
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.saved_memory import alive_after, kept_by_autograd, rules_of_gpus
from tests.tiny_models import ARCHITECTURES, attached, forward, inputs, tokens
from tests.tiny_world import Pair

SHAPE = (2, 2, 8, 12)
"""(B, T, Y, X) of latents."""
METHODS = {
    "blocks": Lora(rank=4),
    "norms": Lora(rank=4, norms=True),
    "attention with biases": Lora(rank=4, targets="attention", biases=True),
    "feed-forward and norms": Lora(rank=4, targets=(r".*net\.2",), norms=True),
    "values of the last block": Lora(rank=4, targets=(r"(blocks\.1|single\w+\.0)\..*to_v",)),
    "embedders": Lora(rank=4, targets=(r".*(time|timestep|text)_embedder\.linear_2",)),
    "dropout": Lora(rank=4, dropout=0.5),
}
CASES = [(name, "bfloat16") for name in METHODS] + [("blocks", "float32"), ("norms", "float32")]
every_architecture = pytest.mark.parametrize("pair", ARCHITECTURES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def expected(
    pair: Pair, method: Lora, how: Computation, *, shape: tuple[int, ...] = SHAPE
) -> Saved:
    config = TRANSFORMERS[pair.family, pair.task]
    return saved(config, pair.family, tokens(pair, shape), method=method, how=how)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@every_architecture
def test_without_checkpointing_it_is_what_hooks_see(pair: Pair, name: str, dtype: str) -> None:
    model = attached(pair, method=METHODS[name], dtype=dtype)
    measured = kept_by_autograd(forward(pair, model, SHAPE, dtype), model)
    found = expected(pair, METHODS[name], Computation(dtype, gpu=False))
    assert found.forward == measured


@every_dtype
@every_architecture
def test_parts_of_a_single_sample_are_views(pair: Pair, dtype: str) -> None:
    shape = (1, 3, 8, 8)
    model = attached(pair, method=METHODS["blocks"], dtype=dtype)
    measured = kept_by_autograd(forward(pair, model, shape, dtype), model)
    how = Computation(dtype, gpu=False)
    assert expected(pair, METHODS["blocks"], how, shape=shape).forward == measured


@pytest.mark.parametrize("name", ["norms", "feed-forward and norms"])
@every_dtype
@every_architecture
def test_gpus_have_rules_of_their_own(pair: Pair, dtype: str, name: str) -> None:
    model = attached(pair, method=METHODS[name], dtype=dtype)
    with rules_of_gpus():
        measured = kept_by_autograd(forward(pair, model, SHAPE, dtype), model)
    assert expected(pair, METHODS[name], Computation(dtype)).forward == measured


@pytest.mark.parametrize("name", ["blocks", "values of the last block"])
@pytest.mark.parametrize("policy", ["selective", "full"])
@every_dtype
@every_architecture
def test_it_is_what_is_alive_between_forward_and_backward(
    pair: Pair, dtype: str, policy: Policy, name: str
) -> None:
    """Blocks before the first adapter leave nothing."""
    model = attached(pair, policy, method=METHODS[name], dtype=dtype)
    measured = alive_after(forward(pair, model, SHAPE, dtype), model)
    found = expected(pair, METHODS[name], Computation(dtype, gpu=False, policy=policy))
    assert found.forward == measured


@pytest.mark.parametrize("policy", ["selective", "full"])
@every_architecture
def test_blocks_computed_again_have_the_gradients_of_those_that_are_not(
    pair: Pair, policy: Policy
) -> None:
    """Although what is given to the first block has no gradient itself."""
    given, found = inputs(pair, SHAPE), []
    for recompute in ("none", policy):
        torch.manual_seed(0)
        model = attached(pair, recompute, method=METHODS["norms"])
        out: Tensor = model(**given)
        out.square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, again in zip(*found, strict=True):
        assert kept is not None and again is not None
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("blocks", "none"),
        ("blocks", "full"),
        ("feed-forward and norms", "full"),
        ("values of the last block", "full"),
        ("embedders", "none"),
    ],
)
@every_architecture
def test_operations_are_what_torch_counts(pair: Pair, name: str, policy: Policy) -> None:
    """With attention as matrix products: torch has no count of the CPU's fused kernel."""
    method, config = METHODS[name], TRANSFORMERS[pair.family, pair.task]
    found = layers(config, pair.family, tokens(pair, SHAPE), method=method)
    flow = gradients(config, pair.family, method)
    work = flops.training(found, flow) + flops.again(found, flow, policy)
    assert SHAPE[0] * work.actual == counted(attached(pair, policy, method=method), pair)


def counted(model: nn.Module, pair: Pair) -> int:
    """Operations of a forward and backward pass."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out: Tensor = model(**inputs(pair, SHAPE))
        out.sum().backward()
    total: int = counter.get_total_flops()
    return total
