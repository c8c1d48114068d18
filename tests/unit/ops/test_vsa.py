# SPDX-License-Identifier: Apache-2.0
"""Tests of fastvideo/ops/vsa.py: faces and kernels against the references in float64."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastvideo import ops
from fastvideo.ops import Tiles, library

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCES)
Size = tuple[int, int, int]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B,H,S,D), stored as (B,S,H,D), as projections leave it."""
    batch, heads, tokens, channels = shape
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn((batch, tokens, heads, channels), generator=generator).to(dtype)
    return made.requires_grad_().transpose(1, 2)


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in inputs]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).detach().norm() / expected.detach().norm())


def assert_near(
    out: Tensor, inputs: list[Tensor], expected: Tensor, exact_inputs: list[Tensor]
) -> None:
    """Output and all gradients are as near as the dtype allows and laid out as their inputs."""
    tolerance = TOLERANCES[out.dtype]
    grad = random(*out.shape, seed=9, dtype=out.dtype).detach()
    found = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected, exact_inputs, grad.double())
    assert out.stride() == inputs[0].stride()
    for tensor, of in zip(found, inputs, strict=True):
        assert (tensor.dtype, tensor.shape) == (of.dtype, of.shape)
    errors = [error(out, expected), *map(error, found, wanted)]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "heads", "head_dim", "topk", "gated"),
    [
        ((3, 5, 6), 2, 64, 2, True),
        ((4, 8, 8), 1, 128, 3, False),
        ((5, 6, 7), 3, 20, 8, True),
        ((1, 3, 1), 1, 1, 1, True),
        ((2, 3, 9), 2, 256, 1, False),
    ],
)
def test_the_ragged_form_is_the_reference(
    shape: Size, heads: int, head_dim: int, topk: int, gated: bool, dtype: torch.dtype
) -> None:
    tiles = Tiles.from_geometry(*shape)
    size = (3, heads, tiles.num_tokens, head_dim)
    inputs = [random(*size, seed=seed, dtype=dtype) for seed in range(4 if gated else 3)]
    out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=topk)
    index = ops.selected_tiles(inputs[0], inputs[1], tiles=tiles, topk=topk)
    exact_inputs = exact(inputs)
    expected = ops.ragged_sparse_attn_reference(*exact_inputs, tiles=tiles, topk=topk, index=index)
    assert_near(out, inputs, expected, exact_inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_may_be_of_different_videos(dtype: torch.dtype) -> None:
    tiles, kv_tiles = Tiles.from_geometry(3, 5, 6), Tiles.from_geometry(2, 9, 5)
    inputs = [
        random(2, 2, described.num_tokens, 32, seed=seed, dtype=dtype)
        for seed, described in enumerate((tiles, kv_tiles, kv_tiles, tiles))
    ]
    described: dict[str, Any] = {"tiles": tiles, "kv_tiles": kv_tiles, "topk": 3}
    out = ops.ragged_sparse_attn(*inputs, **described)
    index = ops.selected_tiles(inputs[0], inputs[1], **described)
    exact_inputs = exact(inputs)
    expected = ops.ragged_sparse_attn_reference(*exact_inputs, **described, index=index)
    assert_near(out, inputs, expected, exact_inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [(4, 4, 4), 64, 4])
def test_the_padded_form_is_the_ragged_form(block_size: int | Size, dtype: torch.dtype) -> None:
    ragged = Tiles.from_geometry(3, 5, 6)
    sizes = ragged.table[:, 1]
    slots = ops.get_non_pad_index(sizes, 64)
    inputs = [random(2, 2, 90, 64, seed=seed, dtype=dtype) for seed in range(4)]
    padded = [torch.full((2, 2, 256, 64), torch.nan, dtype=dtype) for _ in inputs]
    for of, tokens in zip(padded, inputs, strict=True):
        of[:, :, slots] = tokens.detach()
        of.requires_grad_()
    q, k, v, gate = padded
    out = ops.video_sparse_attn(q, k, v, sizes.long(), sizes.long(), 2, block_size, gate)
    expected = ops.ragged_sparse_attn(*inputs, tiles=ragged, topk=2)
    grad = torch.randn(out.shape).to(dtype)
    found = (out, *torch.autograd.grad(out, padded, grad))
    wanted = (expected, *torch.autograd.grad(expected, inputs, grad[:, :, slots]))
    padding = torch.ones(256, dtype=torch.bool).index_fill(0, slots, False)
    for is_padded, is_ragged in zip(found, wanted, strict=True):
        assert error(is_padded[:, :, slots], is_ragged.double()) < TOLERANCES[dtype]
        assert (is_padded[:, :, padding] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("as_map", [True, False])
def test_the_fine_stage_alone_is_the_reference(as_map: bool, dtype: torch.dtype) -> None:
    sizes = torch.tensor([64, 1, 33, 64, 50])
    generator = torch.Generator().manual_seed(5)
    block_map = torch.rand((2, 2, 3, 5), generator=generator) < 0.5
    block_map[0, 0, 1] = False
    block_map[1, 1, 2] = True
    chosen: list[Tensor] = [block_map]
    if not as_map:
        index = block_map.byte().argsort(dim=-1, descending=True, stable=True)
        counts = block_map.sum(dim=-1)
        index[torch.arange(5) >= counts[..., None]] = -1
        chosen = [index, counts]
    face: Callable[..., tuple[Tensor, Tensor]] = ops.block_sparse_attn
    reference: Callable[..., tuple[Tensor, Tensor]] = ops.block_sparse_attn_reference
    if not as_map:
        face = ops.block_sparse_attn_from_indices
        reference = ops.block_sparse_attn_from_indices_reference
    inputs = [
        random(2, 2, tokens, 64, seed=seed, dtype=dtype)
        for seed, tokens in enumerate((192, 320, 320))
    ]
    exact_inputs = exact(inputs)
    out, lse = face(*inputs, *chosen, sizes)
    expected, expected_lse = reference(*exact_inputs, *chosen, sizes)
    assert not lse.requires_grad
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4)
    assert (lse[0, 0, 64:128] == -torch.inf).all()
    assert (out[0, 0, 64:128] == 0).all()
    assert_near(out, inputs, expected, exact_inputs)


@pytest.mark.parametrize("topk", [1, 5, 23])
def test_exactly_the_highest_tiles_are_selected(topk: int) -> None:
    tiles = Tiles.from_geometry(7, 16, 11)
    q, k = (random(2, 3, tiles.num_tokens, 32, seed=seed).detach() for seed in range(2))
    index = ops.selected_tiles(q, k, tiles=tiles, topk=topk)
    assert (index.dtype, index.shape) == (torch.int32, (2, 3, tiles.num_tiles, topk))
    assert (index.diff(dim=-1) > 0).all()
    # Random scores are far apart compared to the rounding of float32.
    wanted = ops.selected_tiles_reference(q.double(), k.double(), tiles=tiles, topk=topk)
    assert torch.equal(index, wanted)


def test_of_equal_scores_the_lowest_tile_is_selected() -> None:
    tiles = Tiles.from_geometry(4, 4, 40)
    q, k = torch.ones(1, 1, 640, 8), torch.ones(1, 1, 640, 8)
    k[:, :, 192:320] = 2
    index = ops.selected_tiles(q, k, tiles=tiles, topk=5)
    assert (index == torch.tensor([0, 1, 2, 3, 4])).all()
    assert (ops.selected_tiles(q, k, tiles=tiles, topk=3) == torch.tensor([0, 3, 4])).all()


def test_any_strides_give_the_same_numbers() -> None:
    tiles = Tiles.from_geometry(3, 5, 6)
    wide = torch.randn(2, 2, 90, 3 * 16)
    views = list(wide.split(16, dim=3))
    every_second = [torch.randn(2, 2, 90, 32)[..., ::2] for _ in range(3)]
    for q, k, v in (views, every_second):
        out = ops.ragged_sparse_attn(q, k, v, tiles=tiles, topk=2)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        assert torch.equal(out, ops.ragged_sparse_attn(q, k, v, tiles=tiles, topk=2))


def test_a_gradient_may_be_expanded() -> None:
    tiles = Tiles.from_geometry(3, 5, 6)
    inputs = [random(1, 2, 90, 16, seed=seed) for seed in range(3)]
    out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=2)
    found = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad(out, inputs, torch.ones(out.shape))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_the_same_bits_every_time(dtype: torch.dtype) -> None:
    tiles = Tiles.from_geometry(5, 9, 10)
    inputs = [random(2, 2, 450, 64, seed=seed, dtype=dtype) for seed in range(4)]
    grad = torch.randn(inputs[0].shape).to(dtype)

    def results() -> list[Tensor]:
        out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=4)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    first = results()
    num_threads = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            assert all(map(torch.equal, first, results()))
        finally:
            torch.set_num_threads(num_threads)


def test_autocast_casts_as_for_dense_attention() -> None:
    tiles = Tiles.from_geometry(3, 5, 6)
    inputs = [random(1, 2, 90, 16, seed=seed) for seed in range(4)]
    q, k, v, gate = (x.detach().bfloat16() for x in inputs)
    expected = ops.ragged_sparse_attn(q, k, v, gate, tiles=tiles, topk=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=2)
        mixed = ops.ragged_sparse_attn(q, k, v, inputs[3], tiles=tiles, topk=2)
        reference = ops.ragged_sparse_attn_reference(*inputs, tiles=tiles, topk=2)
    assert out.dtype == reference.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    assert error(out, reference.double()) < 1e-2
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), inputs))


def test_signatures_are_upstreams() -> None:
    def parameters(function: Callable[..., Any]) -> list[str]:
        return list(inspect.signature(function).parameters)

    tokens = ["q", "k", "v"]
    assert parameters(ops.video_sparse_attn) == [
        *tokens,
        "variable_block_sizes",
        "q_variable_block_sizes",
        "topk",
        "block_size",
        "compress_attn_weight",
    ]
    sizes = "variable_block_sizes"
    assert parameters(ops.block_sparse_attn) == [*tokens, "block_map", sizes]
    assert parameters(ops.block_sparse_attn_from_indices) == [*tokens, "q2k_idx", "q2k_num", sizes]


def test_a_sparsity_becomes_a_number_of_tiles() -> None:
    assert [ops.num_selected(0.9, tiles) for tiles in (1, 10, 520, 624)] == [1, 1, 52, 63]
    assert [ops.num_selected(sparsity, 8) for sparsity in (0, 0.5, 0.99, 1)] == [8, 4, 1, 1]
    with pytest.raises(ValueError, match=r"sparsity is 90, expected 0 to 1"):
        ops.num_selected(90, 10)


def ragged(**changes: Any) -> Tensor:
    made = {name: torch.randn(1, 2, 90, 16) for name in "qkv"}
    arguments: dict[str, Any] = {**made, "tiles": Tiles.from_geometry(3, 5, 6), "topk": 2}
    return ops.ragged_sparse_attn(**{**arguments, **changes})


def padded(**changes: Any) -> Tensor:
    made = {name: torch.randn(1, 2, 128, 16) for name in "qkv"}
    sizes = torch.tensor([64, 3])
    names = ("variable_block_sizes", "q_variable_block_sizes")
    return ops.video_sparse_attn(**{**made, **dict.fromkeys(names, sizes), "topk": 1, **changes})


def indexed(**changes: Any) -> tuple[Tensor, Tensor]:
    made = {name: torch.randn(1, 2, 128, 16) for name in "qkv"}
    chosen = {
        "q2k_idx": torch.zeros((1, 2, 2, 1), dtype=torch.int32),
        "q2k_num": torch.ones((1, 2, 2), dtype=torch.int32),
    }
    sizes = torch.tensor([64, 3])
    return ops.block_sparse_attn_from_indices(
        **{**made, **chosen, "variable_block_sizes": sizes, **changes}
    )


def mapped(**changes: Any) -> tuple[Tensor, Tensor]:
    made = {name: torch.randn(1, 2, 128, 16) for name in "qkv"}
    block_map = torch.ones((1, 2, 2, 2), dtype=torch.bool)
    sizes = torch.tensor([64, 3])
    return ops.block_sparse_attn(
        **{**made, "block_map": block_map, "variable_block_sizes": sizes, **changes}
    )


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (ragged, {"q": torch.zeros(90, 16)}, r"q has shape \(90, 16\), expected four axes"),
        (ragged, {"k": torch.zeros(1, 1, 90, 16)}, "as many heads as q"),
        (ragged, {"v": torch.zeros(1, 2, 80, 16)}, r"v has shape .* expected \(1, 2, 90, 16\)"),
        (ragged, {"v": torch.zeros(1, 2, 90, 8)}, "v has shape"),
        (ragged, {"v": torch.zeros(1, 2, 90, 16).half()}, "v is torch.float16 and q torch.float32"),
        (ragged, {"gate": torch.zeros(1, 2, 90, 1)}, "gate has shape"),
        (ragged, {"gate": torch.zeros(1, 2, 90, 16, device="meta")}, "gate is on meta"),
        (ragged, {"topk": 0}, "topk is 0, expected 1 to 4"),
        (ragged, {"topk": 5}, "topk is 5, expected 1 to 4"),
        (ragged, {"tiles": Tiles.from_geometry(3, 5, 7)}, "tiles describes 105 tokens, q has 90"),
        (
            ragged,
            {"kv_tiles": Tiles.from_geometry(3, 5, 7)},
            "kv_tiles describes 105 tokens, k has 90",
        ),
        (
            ragged,
            {"tiles": Tiles.from_geometry(3, 5, 6, device="meta")},
            "tiles is on meta and q on cpu: make it with device=q.device",
        ),
        (padded, {"block_size": (4, 8, 8)}, r"block_size is \(4, 8, 8\), expected .* \(4, 4, 4\)"),
        (padded, {"block_size": 256}, "block_size is 256"),
        (padded, {"topk": 3}, "topk is 3, expected 1 to 2"),
        (
            padded,
            {"variable_block_sizes": torch.tensor([64])},
            r"variable_block_sizes has shape \(1,\), expected one number for every 64 of 128",
        ),
        (
            padded,
            {"q_variable_block_sizes": torch.tensor([64, 64, 64])},
            r"q_variable_block_sizes has shape \(3,\)",
        ),
        (padded, {"variable_block_sizes": torch.tensor([64, 65])}, "must be 1 to 64"),
        (padded, {"variable_block_sizes": torch.tensor([0, 64])}, "must be 1 to 64"),
        (padded, {"compress_attn_weight": torch.zeros(1, 2, 64, 16)}, "gate has shape"),
        (mapped, {"q": torch.zeros(1, 2, 100, 16)}, "q has 100 tokens, expected a multiple of 64"),
        (mapped, {"block_map": torch.ones(1, 2, 3, 2)}, r"block_map has shape \(1, 2, 3, 2\)"),
        (indexed, {"q2k_idx": torch.full((1, 2, 2, 1), 2)}, "q2k_idx must be 0 to 1"),
        (indexed, {"q2k_idx": torch.full((1, 2, 2, 1), -1)}, "q2k_idx must be 0 to 1"),
        (indexed, {"q2k_idx": torch.zeros((1, 2, 2, 3)).int()}, "q2k_idx has 3 columns"),
        (indexed, {"q2k_idx": torch.zeros((1, 2, 2, 1))}, "q2k_idx is torch.float32"),
        (indexed, {"q2k_num": torch.full((1, 2, 2), 2)}, "q2k_num must be 0 to 1"),
        (indexed, {"q2k_num": torch.full((1, 2, 2), -1)}, "q2k_num must be 0 to 1"),
        (indexed, {"q2k_num": torch.zeros((1, 2, 1)).int()}, "q2k_num has shape"),
    ],
)
def test_mistakes_are_named(call: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "message"),
    [
        ("cpu", torch.float64, 64, "q is torch.float64; on cpu there are kernels for float32"),
        ("cpu", torch.float32, 257, "q has head dimension 257, expected 1 to 256"),
        ("cuda", torch.float32, 64, "q is torch.float32; on cuda there are kernels for bfloat16"),
        ("cuda", torch.bfloat16, 96, "head dimension 96; on cuda there are kernels for 64 and 128"),
    ],
)
def test_what_no_kernel_takes_is_refused(
    device: str, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    with FakeTensorMode():
        q, k, v = (torch.zeros(1, 1, 64, head_dim, dtype=dtype, device=device) for _ in "qkv")
        table = torch.zeros((1, 2), dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match=message) as refusal:
            ops.ragged_sparse_attn(q, k, v, tiles=Tiles(table, 64), topk=1)
    assert head_dim == 257 or "fastvideo.ops.ragged_sparse_attn_reference" in str(refusal.value)


def test_without_kernels_calls_say_so_and_references_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "_C.so")
    monkeypatch.setattr(library, "_active", None)
    q, k, v = (torch.randn(1, 2, 90, 16) for _ in "qkv")
    tiles = Tiles.from_geometry(3, 5, 6)
    with pytest.raises(library.KernelsMissing, match="FASTVIDEO_BUILD=none"):
        ops.ragged_sparse_attn(q, k, v, tiles=tiles, topk=2)
    out = ops.ragged_sparse_attn_reference(q, k, v, tiles=tiles, topk=2)
    assert out.shape == q.shape


def test_a_single_token_attends_to_itself() -> None:
    tiles = Tiles.from_geometry(1, 1, 1)
    q, k, v, gate = (random(1, 1, 1, 64, seed=seed) for seed in range(4))
    out = ops.ragged_sparse_attn(q, k, v, gate, tiles=tiles, topk=1)
    torch.testing.assert_close(out, v + v * gate)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(dv, 1 + gate)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_shapes_are_known_without_data() -> None:
    tiles = Tiles.from_geometry(3, 5, 6, device="meta")
    q, k, v = (torch.zeros(1, 2, 90, 16, device="meta", requires_grad=True) for _ in "qkv")
    out = ops.ragged_sparse_attn(q, k, v, tiles=tiles, topk=2)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == out.shape == q.shape
