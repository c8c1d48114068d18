# SPDX-License-Identifier: Apache-2.0
"""Bytes of weights and optimizers against real ones, and what a layout does to each part."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.config.architectures import release
from fastvideo.config.parallel import Parallel
from fastvideo.config.recipe import Recipe
from fastvideo.cost.layers import Tokens
from fastvideo.cost.layout import Layout
from fastvideo.cost.memory import (
    GIB,
    Memory,
    Parameter,
    State,
    memory,
    optimizer_bytes,
    parameters_of,
    state_of,
)
from fastvideo.cost.transformer import layers, parameters
from fastvideo.models.execution import Execution
from fastvideo.models.tiny_configs import TRANSFORMERS
from fastvideo.models.weights import local_rows
from fastvideo.train.method import build_method
from fastvideo.train.optimizer import build_optimizer
from fastvideo.train.parallel import joined, place
from fastvideo.train.process import Process
from tests.ranks import NoStop, Silent, in_ranks
from tests.tiny_models import attached, build, functions
from tests.tiny_world import PAIRS

RECIPES = Path(__file__).parents[3] / "configs/recipes"
WAN_14B = release("wan2.1_t2v_14b").transformer
WAN_14B_SIZE = parameters(WAN_14B, "wan2.1")


def recipe(*overrides: str, name: str = "wan2.1_t2v_14b_full") -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml", ["train.global_batch_size=16", *overrides])


def of(*overrides: str, processes: int = 8, shard: int = 1) -> Memory:
    return memory(recipe(*overrides), WAN_14B, processes=processes, shard=shard)


def bytes_of(value: Any) -> int:
    """Memory of a state tensor, also of torchao's, which are several."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return 0
    names = getattr(value, "tensor_attrs", None)
    parts = [getattr(value, name) for name in names] if names else [value]
    return sum(part.untyped_storage().nbytes() for part in parts)


METHODS = {
    "full": "train.method.kind=full",
    "lora": "train.method={kind: lora, rank: 16, biases: true, norms: true}",
}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("index", [1, 4, 6], ids=lambda index: str(PAIRS[index]))
def test_weights_and_optimizers_are_what_is_counted(index: int, kind: str, method: str) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("torchao")
    pair = PAIRS[index]
    spec = recipe(f"train.optimizer.kind={kind}", method, "train.ema={}").train
    model = attached(pair, method=spec.method, dtype=spec.dtype)
    optimizer = build_optimizer(model, spec.optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    measured = sum(bytes_of(v) for state in optimizer.state.values() for v in state.values())
    config, numbers = TRANSFORMERS[pair.family, pair.task], sum(p.numel() for p in trained)
    found = layers(config, pair.family, Tokens(video=1, text=1), method=spec.method)
    counted = Counter(parameters_of(found, dtype=spec.dtype, spread=False))
    assert state_of(counted, spec, shard=1) == State(
        weights=sum(bytes_of(parameter.data) for parameter in model.parameters()),
        gradients=4 * numbers,
        optimizer=measured,
        average=4 * numbers,
    )


def held_by_one_of_two(rank: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes of all weights and of those that train, by method and dtype."""
    found, pair = {}, PAIRS[1]
    process = Process(NoStop(), Silent(), rank, rank, count=2)
    layout = Layout(replicate=1, shard=2, sequence=1, reason="")
    with joined(process, Parallel(), device="cpu", hang_s=60, choose=lambda _: layout) as team:
        for (name, method), dtype in itertools.product(METHODS.items(), ("float32", "bfloat16")):
            train = recipe(method, f"train.dtype={dtype}").train
            with torch.device("meta"):
                model = build(pair)
            build_method(train).prepare(model)
            functions(pair).attach(model, Execution())
            place(model, team, Parallel(), dtype=getattr(torch, dtype))
            sizes = [(local_rows(p.data)[0].nbytes, p.requires_grad) for p in model.parameters()]
            found[name, dtype] = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
    return found


def test_two_processes_hold_what_is_counted_of_one() -> None:
    first, _ = in_ranks(2, held_by_one_of_two, join=False)
    for (name, dtype), measured in first.items():
        spec, pair = recipe(METHODS[name], f"train.dtype={dtype}").train, PAIRS[1]
        config = TRANSFORMERS[pair.family, pair.task]
        found = layers(config, pair.family, Tokens(video=1, text=1), method=spec.method)
        counted = Counter(parameters_of(found, dtype=dtype, spread=True))
        state = state_of(counted, spec, shard=2)
        assert (state.weights, state.gradients) == measured, (name, dtype)


def test_whole_copies_are_of_16_bytes_a_parameter_and_what_is_computed_with() -> None:
    number = parameters(WAN_14B, "wan2.1")
    exact = of("train.dtype=float32")
    assert exact.weights == exact.gradients == 4 * number and exact.optimizer == 8 * number
    mixed = of("train.activation_checkpointing=none")
    assert mixed.weights == pytest.approx(6 * number, rel=1e-3)
    assert mixed.gradients == 4 * number and mixed.optimizer == 8 * number


def test_shards_divide_weights_gradients_and_optimizer() -> None:
    whole, spread = of("train.dtype=float32"), of("train.dtype=float32", shard=8)
    assert spread.gradients == pytest.approx(whole.gradients / 8, rel=1e-3)
    assert spread.optimizer == 2 * spread.gradients
    assert spread.activations == whole.activations
    assert spread.workspace > whole.workspace  # gathered blocks


def test_eight_bits_take_a_quarter_of_the_optimizer() -> None:
    small = of("train.optimizer.kind=adamw_8bit").optimizer
    assert small / of().optimizer == pytest.approx((2 + 8 / 256) / 8, rel=0.01)


def test_the_host_holds_what_the_gpu_does_not() -> None:
    there, here = of(shard=8), of("parallel.cpu_offload=true", shard=8)
    assert here.host - here.staged == pytest.approx(16 * WAN_14B_SIZE / 8, rel=0.01)
    assert here.gradients + here.optimizer < GIB / 10
    assert here.total < there.total - (here.host - here.staged) * 0.9
    assert there.host == there.staged and not {"host", "staged"} & set(there.parts())


def test_asynchronous_checkpoints_copy_the_state_once_over_all_processes() -> None:
    assert of(processes=1).staged == 12 * WAN_14B_SIZE
    assert of().staged == 12 * WAN_14B_SIZE // 8
    assert of(shard=8).staged == pytest.approx(12 * WAN_14B_SIZE / 8, rel=1e-2)
    small = of("train.optimizer.kind=adamw_8bit", processes=1).staged
    assert small == pytest.approx(6.03 * WAN_14B_SIZE, rel=2e-3)
    for none in (
        ("train.checkpoint.asynchronous=false",),
        ("train.steps=500", "train.checkpoint.every_steps=500"),  # the last one waits
    ):
        assert of(*none).host == 0
    by_the_clock = ("train.steps=500", "train.checkpoint.every_minutes=10")
    assert of(*by_the_clock).host > 0


def test_eight_bits_do_not_depend_on_how_weights_are_spread() -> None:
    """A matrix of 16 rows of 256 is just large enough, in however many parts."""
    spec = recipe("train.optimizer.kind=adamw_8bit").train
    matrix = Parameter(rows=16, row=256, is_matrix=True, spread=True)
    tables = 2 * 4 * 256
    eight_bits = 2 * 4096 + 2 * 4 * 16
    for shard in (1, 2, 16):
        assert optimizer_bytes(matrix, spec, shard=shard) - tables == eight_bits / shard
    smaller = Parameter(rows=15, row=256, is_matrix=True, spread=True)
    assert optimizer_bytes(smaller, spec, shard=1) == 8 * 15 * 256


def test_processes_that_share_a_sample_hold_less_of_it() -> None:
    alone, shared = of(shard=8), of("parallel.sequence=4", shard=8)
    assert shared.activations < 0.35 * alone.activations
    assert shared.workspace < alone.workspace


def test_a_micro_batch_counts_in_activations_only() -> None:
    """One of several samples takes part in sums; the text is padded, so it counts as well."""
    one, two = (of(f"train.micro_batch_size={n}", shard=8) for n in (1, 2))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert (two.gradients, two.optimizer) == (one.gradients, one.optimizer)


def test_policies_of_checkpointing_order_the_memory() -> None:
    none, selective, full = (
        of(f"train.activation_checkpointing={policy}", shard=8).activations
        for policy in ("none", "selective", "full")
    )
    assert full < selective < none
    # Output of the self-attention of each block, bfloat16, and the float32 sums of 40 heads.
    kept = 40 * 32760 * (2 * 5120 + 4 * 40)
    inputs = 40 * 32760 * 5120 * 2
    assert selective > kept + inputs and full > inputs


ADAPTERS = "train.method={kind: lora, rank: 32}"
ADAPTER_SIZE = 40 * 32 * (8 * (5120 + 5120) + 2 * (5120 + 13824))
"""Of 40 blocks with eight projections of attention and two of the feed-forward layers."""


@pytest.mark.parametrize(("policy", "gib"), [("full", 55.5), ("selective", 67.8)])
def test_adapters_of_14b_fit_on_one_gpu_of_80_gb(policy: str, gib: float) -> None:
    """81 frames of 480x832 in bfloat16."""
    options = (f"train.activation_checkpointing={policy}", "train.micro_batch_size=1")
    found = of(ADAPTERS, *options, processes=1)
    assert found.total / GIB == pytest.approx(gib, abs=0.1)
    assert (found.gradients, found.optimizer) == (4 * ADAPTER_SIZE, 8 * ADAPTER_SIZE)
    assert found.staged == 12 * ADAPTER_SIZE
    assert found.weights == pytest.approx(2 * WAN_14B_SIZE + 4 * ADAPTER_SIZE, rel=0.01)


def test_frozen_weights_are_spread_and_cost_nothing_else() -> None:
    """In bfloat16 what is outside of matrices is whole, and the ends are gathered for good."""
    whole, spread = (of(ADAPTERS, "train.dtype=float32", shard=n) for n in (1, 8))
    assert whole.weights == 4 * (WAN_14B_SIZE + ADAPTER_SIZE)
    ends = 4 * (5120 * (16 * 4 + 4096 + 5120 + 256 + 5120 + 6 * 5120) + 5120 * 64)
    assert spread.weights == pytest.approx(whole.weights / 8 + ends, rel=1e-3)
    assert spread.gradients == pytest.approx(whole.gradients / 8, rel=1e-3)
    assert spread.optimizer == 2 * spread.gradients
    mixed = of(ADAPTERS, shard=8)
    assert mixed.weights == pytest.approx(spread.weights / 2, rel=0.02)
    full = of(shard=8)
    assert mixed.workspace < full.workspace - 2 * WAN_14B_SIZE // 40  # no gradients of a block


def test_an_average_is_as_large_as_what_trains() -> None:
    for method in (METHODS["full"], ADAPTERS):
        without, averaged = of(method), of(method, "train.ema={}")
        assert without.average == 0
        assert averaged.average == averaged.gradients
        assert averaged.staged == without.staged + averaged.average // 8
        assert averaged.total == without.total + averaged.average
    offloaded = of("train.ema={}", "parallel.cpu_offload=true", shard=8)
    alone = of("parallel.cpu_offload=true", shard=8)
    more = 2 * 4 * WAN_14B_SIZE / 8  # the average, and its copy
    assert offloaded.host - alone.host == pytest.approx(more, rel=0.01)


SAMPLES = ("train.samples={}", "validation.prompts=prompts.json")
WAN_VAE_SIZE = 126_892_531


def of_a14b(*overrides: str, processes: int, shard: int) -> Memory:
    found = recipe("train.micro_batch_size=1", *overrides, name="wan2.2_t2v_a14b_full")
    config = release("wan2.2_t2v_a14b").transformer
    return memory(found, config, processes=processes, shard=shard)


def test_the_other_expert_and_the_vae_are_there_while_videos_are_made() -> None:
    """In place of what a step leaves behind: gradients and activations."""
    without = of_a14b(ADAPTERS, "train.samples=null", processes=1, shard=1)
    found = of_a14b(ADAPTERS, *SAMPLES, processes=1, shard=1)
    assert (without.sampling, without.peak) == (0, without.total) == (0, found.total)
    frozen = 2 * WAN_14B_SIZE + 4 * ADAPTER_SIZE
    held = 2 * frozen + found.optimizer + 4 * WAN_VAE_SIZE + found.workspace
    assert found.sampling == pytest.approx(held, rel=0.01)
    assert found.peak == found.sampling > found.total
    full = of_a14b(*SAMPLES, "train.dtype=float32", "train.ema={}", processes=8, shard=8)
    held = (2 + 2 + 1) * full.gradients + 4 * WAN_VAE_SIZE + full.workspace
    ends = 2 * 4 * 5120 * (16 * 4 + 4096 + 5120 + 256 + 5120 + 6 * 5120 + 64)
    assert full.sampling == pytest.approx(held + ends, rel=1e-3)
    assert full.peak == full.total > full.sampling


def test_whole_copies_keep_their_buckets_while_videos_are_made() -> None:
    alone, several = (of(*SAMPLES, processes=n) for n in (1, 2))
    batch = several.workspace - alone.workspace
    assert several.sampling == alone.sampling + several.gradients + batch


def test_the_other_expert_is_on_the_host_where_weights_are() -> None:
    offload = "parallel.cpu_offload=true"
    alone, found = (
        of_a14b(offload, *more, processes=8, shard=8) for more in (["train.samples=null"], SAMPLES)
    )
    assert found.host - alone.host == pytest.approx(4 * WAN_14B_SIZE / 8, rel=0.01)
