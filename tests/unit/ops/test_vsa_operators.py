# SPDX-License-Identifier: Apache-2.0
"""Tests of fastvideo/ops/vsa_operators.py: what torch is told of operators, and torch.compile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastvideo import ops
from fastvideo.ops import Tiles
from fastvideo.ops.library import operators


def tokens(seed: int = 0, *, heads: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1,H,90,16), stored as (1,90,H,16)."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn((1, 90, heads, 16), generator=generator).to(dtype)
    return made.requires_grad_().transpose(1, 2)


TILES = Tiles.from_geometry(3, 5, 6)


def fine_arguments(*, counts: bool, coarse: bool, gate: bool) -> tuple[Any, ...]:
    index = torch.tensor([0, 2, 3], dtype=torch.int32).expand(1, 2, 4, 3).contiguous()
    return (
        tokens(seed=0),
        tokens(seed=1),
        tokens(seed=2),
        index,
        torch.tensor([[[3, 0, 1, 2], [1, 2, 3, 0]]], dtype=torch.int32) if counts else None,
        TILES.table,
        TILES.table,
        torch.randn(1, 2, 4, 16).requires_grad_() if coarse else None,
        tokens(seed=3) if gate else None,
    )


def backward_arguments(**given: bool) -> tuple[Any, ...]:
    forward = tuple(x.detach() if isinstance(x, Tensor) else x for x in fine_arguments(**given))
    q, k, v, index, counts, q_tiles, kv_tiles, coarse, gate = forward
    out, lse = operators().vsa_fine_forward(*forward)
    offsets, rows = operators().vsa_invert(index, counts, 4)
    grad = tokens(seed=4).detach()
    chosen = (index, counts, offsets, rows, q_tiles, kv_tiles)
    return (grad, q, k, v, out, lse, *chosen, coarse, gate)


INDEX = torch.tensor([0, 2, 3], dtype=torch.int32).expand(1, 2, 4, 3).contiguous()
SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "vsa_coarse": lambda: (
        tokens(seed=0),
        tokens(seed=1),
        tokens(seed=2),
        TILES.table,
        TILES.table,
    ),
    "vsa_coarse_backward": lambda: tuple(torch.randn(1, 2, 4, 16) for _ in range(5)),
    "vsa_pool": lambda: (tokens(), TILES.table),
    "vsa_pool-bfloat16": lambda: (tokens(dtype=torch.bfloat16), TILES.table),
    "vsa_pool_backward": lambda: (torch.randn(1, 2, 4, 16), TILES.table, 90, torch.bfloat16),
    "vsa_topk": lambda: (torch.randn(1, 2, 4, 4), 3),
    "vsa_map_to_index": lambda: (torch.rand(1, 2, 4, 4) < 0.5,),
    "vsa_invert": lambda: (INDEX, None, 4),
    "vsa_invert-counts": lambda: (INDEX, torch.full((1, 2, 4), 3, dtype=torch.int32), 4),
    "vsa_fine_forward": lambda: fine_arguments(counts=False, coarse=True, gate=True),
    "vsa_fine_forward-counts": lambda: fine_arguments(counts=True, coarse=False, gate=False),
    "vsa_fine_forward-no-gate": lambda: fine_arguments(counts=False, coarse=True, gate=False),
    "vsa_fine_backward": lambda: backward_arguments(counts=False, coarse=True, gate=True),
    "vsa_fine_backward-counts": lambda: backward_arguments(counts=True, coarse=False, gate=False),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_operators_are_registered_rightly(sample: str) -> None:
    operator = getattr(operators(), sample.partition("-")[0]).default
    torch.library.opcheck(operator, SAMPLES[sample]())


def ragged(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return ops.ragged_sparse_attn(q, k, v, gate, tiles=TILES, topk=2)


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def test_compiled_code_gives_the_same_numbers_and_keeps_no_more() -> None:
    inputs = [tokens(seed=seed) for seed in range(4)]

    def scaled(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return ragged(q * 2, k + 1, v, gate.sin())

    kept: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    compiled = torch.compile(scaled, fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = results(compiled, inputs)
    torch.testing.assert_close(found, results(scaled, inputs))
    assert (1, 2, 90, 16) in kept
    assert (1, 2, 4, 4) not in kept  # probabilities of the coarse stage


def test_upstreams_form_compiles_as_one_graph_of_any_shape() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, sizes: Tensor) -> Tensor:
        return ops.video_sparse_attn(q, k, v, sizes, sizes, 2, (4, 4, 4), gate)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tiles in (3, 5):
        shape = (2, 2, 64 * num_tiles, 16)
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(4)]
        sizes = torch.randint(1, 65, (num_tiles,))
        found = results(partial(compiled, sizes=sizes), inputs)
        torch.testing.assert_close(found, results(partial(attend, sizes=sizes), inputs))


def test_autocast_and_checks_of_values_compile() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, sizes: Tensor) -> Tensor:
        counts = torch.ones(index.shape[:3], dtype=torch.int32)
        return ops.block_sparse_attn_from_indices(q, k, v, index, counts, sizes)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = (torch.randn(1, 1, 128, 16) for _ in "qkv")
    index, sizes = torch.tensor([[[[1], [0]]]]), torch.tensor([64, 9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(q, k, v, index, sizes)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, attend(q, k, v, index, sizes))
        with pytest.raises(RuntimeError, match="q2k_idx must be 0 to 1"):
            compiled(q, k, v, index + 1, sizes)


def test_there_is_no_second_derivative() -> None:
    inputs = [tokens(seed=seed) for seed in range(4)]
    out = ragged(*inputs)
    (first, *_) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def test_flops_are_those_of_tokens_that_take_part() -> None:
    q, k, v, gate = (tokens(seed=seed) for seed in range(4))
    coarse = 4 * 2 * 4 * 4 * 16

    assert TILES.table[:, 1].tolist() == [48, 24, 12, 6]
    every = 4 * 2 * 90 * 90 * 16
    assert flops(lambda: ops.ragged_sparse_attn(q, k, v, gate, tiles=TILES, topk=4)) == (
        every + coarse
    )
    out = ops.ragged_sparse_attn(q, k, v, gate, tiles=TILES, topk=4)
    assert flops(out.sum().backward) == (every + coarse) * 5 // 2

    forward = fine_arguments(counts=True, coarse=False, gate=False)
    pairs = 48 * (48 + 12 + 6) + 12 * 48 + 6 * (48 + 12)
    pairs += 48 * 48 + 24 * (48 + 12) + 12 * (48 + 12 + 6)
    assert flops(lambda: operators().vsa_fine_forward(*forward)) == 4 * 16 * pairs


def test_flops_of_a_video_without_padding() -> None:
    with FakeTensorMode():
        q, k, v = (torch.zeros(1, 1, 32760, 128) for _ in "qkv")
        tiles = Tiles(torch.zeros((624, 2), dtype=torch.int32), 32760)
        counted = flops(lambda: ops.ragged_sparse_attn(q, k, v, tiles=tiles, topk=624))
    assert counted == 4 * 128 * (32760**2 + 624**2)
