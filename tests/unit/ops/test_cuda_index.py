# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels that choose and list tiles, run in the emulator, against plain torch.

Axes: B batch, H heads, S tokens, D channels, Q query tiles, K key tiles, k selected tiles.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

SEEDS = ("1", "2")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What is allocated holds NaN, or the largest integer, until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def table(*tiles: tuple[int, int]) -> Tensor:
    """First token and number of tokens of each tile."""
    return torch.tensor(tiles, dtype=torch.int32)


def means(x: Tensor, tiles: Tensor) -> Tensor:
    """Means over the tokens of each tile in float64."""
    parts = [x[:, :, first : first + n].double().mean(2) for first, n in tiles.tolist()]
    return torch.stack(parts, dim=2)


TILES = table((2, 64), (70, 1), (71, 48), (120, 17))
NUM_TOKENS = 140


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 8, 40, 5])
def test_tiles_are_pooled_and_their_gradients_spread(
    emulator: Any, dtype: torch.dtype, dim: int
) -> None:
    x = torch.randn(2, NUM_TOKENS, 3, dim).to(dtype).transpose(1, 2)
    pooled = emulator.ops.vsa_pool(x, TILES)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), means(x, TILES), atol=1e-6, rtol=1e-5)

    x64 = x.double().requires_grad_()
    grad = torch.randn(2, 3, len(TILES), dim)
    means(x64, TILES).backward(grad.double())
    assert x64.grad is not None
    spread = emulator.ops.vsa_pool_backward(grad, TILES, NUM_TOKENS, dtype)
    assert spread.dtype == dtype
    torch.testing.assert_close(spread, x64.grad.to(dtype), atol=1e-6, rtol=1e-2)
    assert torch.equal(spread == 0, x64.grad == 0)  # padding before, between and after tiles


def test_tables_that_do_not_fit_the_tokens_are_brought_to_fit(emulator: Any) -> None:
    x = torch.ones(1, 1, 10, 64)
    tiles = table((-5, 64), (8, 1000), (5000, 3), (3, -7))
    pooled = emulator.ops.vsa_pool(x, tiles)
    assert torch.equal(pooled[0, 0, :, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    emulator.ops.vsa_pool_backward(torch.ones(1, 1, 4, 64), tiles, 10, torch.float32)


def choose(scores: Tensor, k: int) -> Tensor:
    """The k highest, of equal ones the first, NaN lowest; ascending."""

    def of_row(row: list[float]) -> list[int]:
        best = sorted(
            range(len(row)),
            key=lambda i: (-row[i] if row[i] == row[i] else math.inf, row[i] != row[i], i),
        )
        return sorted(best[:k])

    rows = [of_row(row) for row in scores.flatten(0, 2).tolist()]
    return torch.tensor(rows, dtype=torch.int32).reshape(*scores.shape[:3], k)


@pytest.mark.parametrize(
    ("num_tiles", "k"),
    [(1, 1), (31, 4), (32, 32), (200, 20), (500, 1), (1000, 999), (1440, 144), (2100, 210)],
)
def test_the_highest_scores_are_chosen(emulator: Any, num_tiles: int, k: int) -> None:
    scores = torch.randn(1, 2, 5, num_tiles, generator=torch.Generator().manual_seed(k))
    scores[0, 0, 1] = scores[0, 0, 1].mul(2).round()  # ties, zeros of both signs
    scores[0, 0, 2] = 0.25
    scores[0, 0, 3, ::2] = torch.nan
    scores[0, 0, 4, 1::3] = -torch.inf
    scores[0, 1, 0, ::5] = torch.inf
    scores[0, 1, 1] = torch.nan
    scores[0, 1, 2] *= 1e-42  # subnormal
    scores[0, 1, 3, : num_tiles // 2] = -torch.nan
    assert torch.equal(emulator.ops.vsa_topk(scores, k), choose(scores, k))
    assert torch.equal(emulator.ops.vsa_topk(scores[:, :, ::2], k), choose(scores, k)[:, :, ::2])


@pytest.mark.parametrize("num_tiles", [1, 33, 130])
def test_a_map_becomes_an_index(emulator: Any, num_tiles: int) -> None:
    block_map = torch.rand(2, 2, 5, num_tiles) < 0.3
    block_map[0, 0, 0], block_map[0, 0, 1] = False, True
    index, counts = emulator.ops.vsa_map_to_index(block_map)
    assert torch.equal(counts, block_map.sum(-1, dtype=torch.int32))
    for row, count, chosen in zip(
        index.flatten(0, 2), counts.flatten(), block_map.flatten(0, 2), strict=True
    ):
        assert row[:count].tolist() == chosen.nonzero().flatten().tolist()
        assert not row[count:].any()


def inverse(index: Tensor, counts: Tensor | None, num_kv_tiles: int) -> tuple[Tensor, Tensor]:
    """Offsets and rows of each head, in Python."""
    batch, heads, q_tiles, k = index.shape
    offsets = torch.zeros(batch, heads, num_kv_tiles + 1, dtype=torch.int32)
    rows = torch.zeros(batch, heads, q_tiles * k, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            lists: list[list[int]] = [[] for _ in range(num_kv_tiles)]
            for q in range(q_tiles):
                count = k if counts is None else int(counts[b, h, q])
                for tile in index[b, h, q, :count].tolist():
                    if 0 <= tile < num_kv_tiles:
                        lists[tile].append(q)
            ends = torch.tensor([len(one) for one in lists]).cumsum(0)
            offsets[b, h, 1:] = ends.int()
            flat = [q for one in lists for q in one]
            rows[b, h, : len(flat)] = torch.tensor(flat, dtype=torch.int32)
    return offsets, rows


@pytest.mark.parametrize(
    ("q_tiles", "num_kv_tiles", "k"),
    [(1, 1, 1), (5, 7, 3), (33, 40, 40), (1100, 20, 2), (40, 1030, 30), (3, 8300, 50)],
)
def test_an_index_is_inverted(
    emulator: Any, monkeypatch: pytest.MonkeyPatch, q_tiles: int, num_kv_tiles: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(q_tiles)
    scores = torch.rand(1, 2, q_tiles, num_kv_tiles, generator=generator)
    index = scores.topk(k).indices.int()  # in any order
    counts = torch.randint(0, k + 1, index.shape[:3], generator=generator, dtype=torch.int32)
    for given in (None, counts):
        wanted = inverse(index, given, num_kv_tiles)
        for seed in SEEDS:
            monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", seed)
            got = emulator.ops.vsa_invert(index, given, num_kv_tiles)
            assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_what_is_out_of_range_in_an_index_is_skipped(emulator: Any) -> None:
    index = torch.tensor([[[[-1, 5, 2**31 - 1], [4, -(2**31), 0]]]], dtype=torch.int32)
    counts = torch.tensor([[[7, -3]]], dtype=torch.int32)
    offsets, rows = emulator.ops.vsa_invert(index, None, 5)
    assert offsets.flatten().tolist() == [0, 1, 1, 1, 1, 2]
    assert rows.flatten().tolist() == [1, 1, 0, 0, 0, 0]
    offsets, rows = emulator.ops.vsa_invert(index, counts, 6)
    assert offsets.flatten().tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert not rows.any()


def test_a_tile_that_is_named_twice_counts_once(emulator: Any) -> None:
    index = torch.tensor([[[[2, 2], [2, 1]]]], dtype=torch.int32)
    offsets, rows = emulator.ops.vsa_invert(index, None, 3)
    assert offsets.flatten().tolist() == [0, 0, 1, 3]
    assert rows.flatten().tolist() == [1, 0, 1, 0]
