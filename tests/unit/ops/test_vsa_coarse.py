# SPDX-License-Identifier: Apache-2.0
"""Tests of fastvideo/ops/vsa_coarse.py."""

from itertools import starmap

import torch
from torch import Tensor

from fastvideo.ops import Tiles
from fastvideo.ops.library import operators
from fastvideo.ops.vsa_coarse import attend, attend_backward

TILES, KV_TILES = Tiles.from_geometry(3, 5, 6), Tiles.from_geometry(2, 9, 3)


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the operator."""
    shapes = (2, 3, 90, 8), (2, 3, 54, 8), (2, 3, 54, 8)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v, TILES.table, KV_TILES.table


def test_the_gradient_is_that_of_autograd() -> None:
    shapes = (2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    _, out = attend((q, k, v))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    means = q.detach(), k.detach(), v.detach()
    torch.testing.assert_close(attend_backward(grad, means, out.detach()), expected)


def test_no_probabilities_are_kept() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores, out, *means = operators().vsa_coarse(*tokens())
    assert scores.shape == (2, 3, 4, 3)
    assert not any(x.requires_grad for x in (scores, *means))
    tables = TILES.table, KV_TILES.table
    assert kept == [tuple(x.shape) for x in (*means, out, *tables)]


def test_it_is_float32_under_autocast_too() -> None:
    inputs = tokens(torch.bfloat16)
    expected = operators().vsa_coarse(*inputs)
    expected_gradients = torch.autograd.grad(expected[1].sum(), inputs[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = operators().vsa_coarse(*inputs)
        gradients = torch.autograd.grad(found[1].sum(), inputs[:3])
    assert all(x.dtype == torch.float32 for x in found)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, gradients, expected_gradients))


def test_numbers_do_not_depend_on_threads() -> None:
    q, k, v = (torch.randn(1, 2, 300, 128) for _ in "qkv")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        several = attend((q, k, v))
    finally:
        torch.set_num_threads(num_threads)
    assert all(starmap(torch.equal, zip(attend((q, k, v)), several, strict=True)))
