# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention's CUDA kernels on a GPU, against float64 and against the CPU kernels."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastvideo import ops
from fastvideo.ops import Tiles, library

DEVICE = "cuda"
LARGEST_ERROR = 1e-2  # relative, of float16 and bfloat16
KERNELS = ("mma", "wgmma")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations, where the device has the instructions."""
    if request.param == "wgmma" and ops.backends()["vsa"]["cuda"] != "wgmma":
        pytest.skip("wgmma needs a GPU of capability 9.0 and a build for 9.0a")
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that outputs will be given holds NaN, so that what is not written shows."""
    gc.collect()
    torch.cuda.empty_cache()
    block = torch.full((256 * 2**20,), torch.nan, device=DEVICE)
    del block
    yield


def tokens(
    shape: tuple[int, ...], *, dtype: torch.dtype, layout: str = "BHSD", seed: int = 0
) -> Tensor:
    """Random (B,H,S,D), in memory as ``layout`` says."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    batch, heads, length, channels = shape
    if layout == "BSHD":
        x = torch.randn(batch, length, heads, channels, generator=generator, device=DEVICE)
        return x.to(dtype).transpose(1, 2).requires_grad_()
    x = torch.randn(shape, generator=generator, device=DEVICE)
    return x.to(dtype).requires_grad_()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


GEOMETRIES = [
    pytest.param((4, 4, 4), 1, id="one tile"),
    pytest.param((5, 6, 9), 3, id="ragged"),
    pytest.param((5, 6, 9), 12, id="ragged, all tiles"),
    pytest.param((8, 16, 16), 1, id="whole tiles, topk 1"),
    pytest.param((9, 18, 22), 9, id="more ragged"),
]


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize(("geometry", "topk"), GEOMETRIES)
def test_ragged_attention_and_its_gradients(
    kernel: str,
    geometry: tuple[int, int, int],
    topk: int,
    channels: int,
    dtype: torch.dtype,
    layout: str,
) -> None:
    tiles = Tiles.from_geometry(*geometry, device=DEVICE)
    shape = (2, 3, tiles.num_tokens, channels)
    inputs = [tokens(shape, dtype=dtype, layout=layout, seed=seed) for seed in range(4)]
    grad = tokens(shape, dtype=dtype, layout=layout, seed=9).detach()
    out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=topk)
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    index = ops.selected_tiles(*inputs[:2], tiles=tiles, topk=topk)
    precise = [x.detach().double().requires_grad_() for x in inputs]
    expected_out = ops.ragged_sparse_attn_reference(*precise, tiles=tiles, topk=topk, index=index)
    expected = [expected_out, *torch.autograd.grad(expected_out, precise, grad.double())]
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < LARGEST_ERROR, dict(
        zip(("out", "q", "k", "v", "gate"), errors, strict=True)
    )


def test_lists_of_any_length_and_keys_of_another_number(kernel: str) -> None:
    q = tokens((2, 2, 6 * 64, 128), dtype=torch.bfloat16)
    k, v = (tokens((2, 2, 9 * 64, 128), dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    generator = torch.Generator(DEVICE).manual_seed(3)
    block_map = torch.rand(2, 2, 6, 9, generator=generator, device=DEVICE) > 0.6
    block_map[:, :, 2] = False
    sizes = torch.tensor([64, 1, 17, 64, 33, 48, 64, 63, 5], device=DEVICE)
    grad = tokens(tuple(q.shape), dtype=torch.bfloat16, seed=4).detach()
    out, lse = ops.block_sparse_attn(q, k, v, block_map, sizes)
    found = torch.autograd.grad(out, (q, k, v), grad)
    precise = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected_out, expected_lse = ops.block_sparse_attn_reference(
        precise[0], precise[1], precise[2], block_map, sizes
    )
    expected = torch.autograd.grad(expected_out, precise, grad.double())
    assert relative(out, expected_out) < LARGEST_ERROR
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    assert (out[:, :, 128:192] == 0).all()
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < LARGEST_ERROR


def test_padding_may_hold_anything(kernel: str) -> None:
    sizes = torch.tensor([64, 40, 3, 64, 17], device=DEVICE)
    slots = torch.arange(64, device=DEVICE) < sizes[:, None]
    q, k, v, gate = (
        tokens((1, 2, 5 * 64, 64), dtype=torch.bfloat16, seed=seed) for seed in range(4)
    )
    spoiled = [
        torch.where(slots.flatten()[:, None], x.detach(), torch.nan).requires_grad_()
        for x in (q, k, v, gate)
    ]
    clean = [x.detach().clone().requires_grad_() for x in (q, k, v, gate)]
    results = []
    for inputs in (clean, spoiled):
        q, k, v, gate = inputs
        out = ops.video_sparse_attn(q, k, v, sizes, sizes, 2, (4, 4, 4), gate)
        results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert (b[:, :, ~slots.flatten()] == 0).all()


def test_480p_of_81_frames_has_the_same_bits_twice(kernel: str) -> None:
    tiles = Tiles.from_geometry(21, 30, 52, device=DEVICE)
    shape = (1, 4, tiles.num_tokens, 128)
    inputs = [tokens(shape, dtype=torch.bfloat16, layout="BSHD", seed=seed) for seed in range(4)]
    grad = tokens(shape, dtype=torch.bfloat16, layout="BSHD", seed=9).detach()
    topk = ops.num_selected(0.9, tiles.num_tiles)

    def run() -> list[Tensor]:
        out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=topk)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    first = run()
    for _ in range(3):
        for a, b in zip(first, run(), strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


def test_both_kernels_agree_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.backends()["vsa"]["cuda"] != "wgmma":
        pytest.skip("wgmma needs a GPU of capability 9.0 and a build for 9.0a")
    tiles = Tiles.from_geometry(20, 30, 52, device=DEVICE)
    shape = (1, 12, tiles.num_tokens, 128)
    inputs = [tokens(shape, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    results = []
    for name in KERNELS:
        monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", name)
        out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=52)
        results.append([out, *torch.autograd.grad(out, inputs, inputs[0].detach())])
    for a, b in zip(*results, strict=True):
        assert relative(a, b.double()) < LARGEST_ERROR


def test_nothing_waits_for_the_device_and_a_graph_can_be_captured(kernel: str) -> None:
    tiles = Tiles.from_geometry(8, 16, 16, device=DEVICE)
    inputs = [
        tokens((1, 2, tiles.num_tokens, 128), dtype=torch.bfloat16, seed=seed) for seed in range(4)
    ]

    def run() -> list[Tensor]:
        out = ops.ragged_sparse_attn(*inputs, tiles=tiles, topk=5)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.detach().fill_(torch.nan)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_compiled_it_gives_the_same(kernel: str) -> None:
    tiles = Tiles.from_geometry(5, 9, 10, device=DEVICE)
    q, k, v, gate = (
        tokens((1, 2, tiles.num_tokens, 64), dtype=torch.bfloat16, seed=seed) for seed in range(4)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return ops.ragged_sparse_attn(q * 2, k, v, gate, tiles=tiles, topk=4) + 1

    plain = attend(q, k, v, gate)
    compiled = torch.compile(attend, fullgraph=True)(q, k, v, gate)
    torch.testing.assert_close(compiled, plain)
    grads = [torch.autograd.grad(x.float().sum(), (q, k, v, gate)) for x in (plain, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_index_kernels_agree_with_the_cpus() -> None:
    operators = library.operators()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 130, 700, generator=generator)
    scores[0, 0] = scores[0, 0].round()  # ties
    scores[1, 1, :5] = torch.nan
    for k in (1, 70, 699, 700):
        index = operators.vsa_topk(scores, k)
        assert torch.equal(operators.vsa_topk(scores.to(DEVICE), k).cpu(), index)
        counts = torch.randint(0, k + 1, index.shape[:3], generator=generator, dtype=torch.int32)
        for some in (None, counts):
            found = operators.vsa_invert(
                index.to(DEVICE), None if some is None else some.to(DEVICE), 700
            )
            offsets, rows = operators.vsa_invert(index, some, 700)
            assert torch.equal(found[0].cpu(), offsets)
            for b in range(2):
                for h in range(3):
                    end = int(offsets[b, h, -1])
                    assert torch.equal(found[1][b, h, :end].cpu(), rows[b, h, :end])
    block_map = torch.rand(2, 3, 50, 333, generator=generator) > 0.8
    for a, b in zip(
        operators.vsa_map_to_index(block_map.to(DEVICE)),
        operators.vsa_map_to_index(block_map),
        strict=True,
    ):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooling_agrees_with_the_cpus(dtype: torch.dtype) -> None:
    operators = library.operators()
    tiles = Tiles.from_geometry(5, 9, 10)
    x = torch.randn(2, tiles.num_tokens, 3, 128).to(dtype).transpose(1, 2)
    found = operators.vsa_pool(x.to(DEVICE), tiles.table.to(DEVICE))
    expected = operators.vsa_pool(x, tiles.table)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    back = operators.vsa_pool_backward(found, tiles.table.to(DEVICE), tiles.num_tokens, dtype)
    torch.testing.assert_close(
        back.cpu(), operators.vsa_pool_backward(expected, tiles.table, tiles.num_tokens, dtype)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("q2k_idx[0, 0, 0, 0] = 4", "assert"),
        ("q2k_idx[0, 0, 0, 0] = -1", "assert"),
        ("q2k_num[0, 0, 0] = 3", "assert"),
        ("sizes[1] = 65", "assert"),
    ],
)
def test_values_out_of_range_are_an_assertion_of_the_device(change: str, reason: str) -> None:
    # In a process of its own: nothing can use the device after an assertion of it.
    code = f"""
import torch
from fastvideo import ops
q, k, v = (torch.randn(1, 1, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
q2k_idx = torch.zeros(1, 1, 4, 2, dtype=torch.int32, device="cuda")
q2k_idx[..., 1] = 3
q2k_num = torch.full((1, 1, 4), 2, dtype=torch.int32, device="cuda")
sizes = torch.full((4,), 64, dtype=torch.int32, device="cuda")
{change}
ops.block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, sizes)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode != 0
    assert reason in done.stderr.lower()
    assert "illegal memory access" not in done.stderr


@pytest.mark.parametrize(
    ("dtype", "channels", "reason"),
    [(torch.float32, 64, "float32"), (torch.bfloat16, 96, "96")],
)
def test_what_has_no_kernel_is_refused_with_the_reference_as_the_way_out(
    dtype: torch.dtype, channels: int, reason: str
) -> None:
    tiles = Tiles.from_geometry(4, 4, 8, device=DEVICE)
    q, k, v = (tokens((1, 1, 128, channels), dtype=dtype, seed=seed) for seed in range(3))
    with pytest.raises(ValueError, match=f"{reason}.*ragged_sparse_attn_reference"):
        ops.ragged_sparse_attn(q, k, v, tiles=tiles, topk=1)
