# SPDX-License-Identifier: Apache-2.0
"""Tests of fastvideo/ops/vsa_reference.py against dense attention with a mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.ops import (
    Tiles,
    block_sparse_attn_from_indices_reference,
    block_sparse_attn_reference,
    ragged_sparse_attn_reference,
    selected_tiles_reference,
    video_sparse_attn_reference,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, dtype=torch.float64, generator=generator)
    return made.requires_grad_()


def tile_of_token(tiles: Tiles) -> Tensor:
    """Tile of each token, -1 for padding."""
    owners = torch.full((tiles.num_tokens,), -1)
    for tile, (first, count) in enumerate(tiles.table.tolist()):
        owners[first : first + count] = tile
    return owners


def dense(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, tiles: Tiles, kv: Tiles) -> Tensor:
    rows, columns = tile_of_token(tiles), tile_of_token(kv)
    mask = block_map[:, :, rows][..., columns] & (rows >= 0)[:, None] & (columns >= 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return torch.where(mask.any(dim=-1, keepdim=True), out, 0)


def to_map(index: Tensor, num_kv_tiles: int) -> Tensor:
    block_map = torch.zeros((*index.shape[:3], num_kv_tiles), dtype=torch.bool)
    return block_map.scatter_(3, index.long(), True)


def mean_of_tiles(x: Tensor, tiles: Tiles) -> Tensor:
    parts = [x[:, :, first : first + count] for first, count in tiles.table.tolist()]
    return torch.stack([part.mean(dim=2) for part in parts], dim=2)


def expected_vsa(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *, tiles: Tiles, kv: Tiles
) -> Tensor:
    q_means, k_means, v_means = (
        mean_of_tiles(q, tiles),
        mean_of_tiles(k, kv),
        mean_of_tiles(v, kv),
    )
    scores = q_means @ k_means.mT / q.shape[3] ** 0.5
    coarse = scores.softmax(dim=-1) @ v_means
    owners = tile_of_token(tiles)
    coarse = torch.where((owners >= 0)[:, None], coarse[:, :, owners], 0)
    index = scores.topk(2).indices
    fine = dense(q, k, v, to_map(index, kv.num_tiles), tiles, kv)
    return fine + (coarse if gate is None else coarse * gate)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kv_shape", [None, (3, 4, 9)])
def test_the_ragged_form_is_dense_attention_with_a_mask(
    gated: bool, kv_shape: tuple[int, int, int] | None
) -> None:
    tiles = Tiles.from_geometry(3, 5, 6)
    kv = Tiles.from_geometry(*kv_shape) if kv_shape else tiles
    q, gate = random(2, 3, tiles.num_tokens, 8), random(2, 3, tiles.num_tokens, 8, seed=3)
    k, v = (random(2, 3, kv.num_tokens, 8, seed=seed) for seed in (1, 2))
    inputs = [q, k, v, *([gate] if gated else [])]
    weights = random(*q.shape, seed=4).detach()

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * weights).sum(), inputs)

    out = ragged_sparse_attn_reference(
        q, k, v, gate if gated else None, tiles=tiles, kv_tiles=kv, topk=2
    )
    expected = expected_vsa(q, k, v, gate if gated else None, tiles=tiles, kv=kv)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out), gradients(expected))


def test_the_padded_form_agrees_with_the_ragged_form_and_reads_no_padding() -> None:
    ragged = Tiles.from_geometry(3, 5, 6)
    sizes = ragged.table[:, 1]
    slots = torch.nonzero((torch.arange(64) < sizes[:, None]).flatten()).squeeze(1)
    q, k, v, gate = (random(1, 2, 90, 4, seed=seed) for seed in range(4))

    def pad(x: Tensor) -> Tensor:
        return torch.full((1, 2, 256, 4), torch.nan, dtype=x.dtype).index_copy(2, slots, x)

    out = video_sparse_attn_reference(
        pad(q), pad(k), pad(v), sizes, sizes, 2, compress_attn_weight=pad(gate).nan_to_num(7)
    )
    expected = ragged_sparse_attn_reference(q, k, v, gate, tiles=ragged, topk=2)
    torch.testing.assert_close(out[:, :, slots], expected)
    padding = torch.ones(256, dtype=torch.bool).index_fill(0, slots, False)
    assert (out[:, :, padding] == 0).all()


def test_the_fine_stage_alone_is_dense_attention_with_a_mask() -> None:
    sizes = torch.tensor([64, 5, 40])
    kv = Tiles.from_block_sizes(sizes)
    full = Tiles.from_block_sizes(torch.tensor([64, 64]))
    q, k, v = random(1, 2, 128, 8), random(1, 2, 192, 8, seed=1), random(1, 2, 192, 8, seed=2)
    block_map = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]], dtype=torch.bool)
    out, lse = block_sparse_attn_reference(q, k, v, block_map, sizes)
    expected = dense(q, k, v, block_map[None], full, kv)
    torch.testing.assert_close(out, expected)
    inputs, weights = (q, k, v), random(*out.shape, seed=5).detach()
    torch.testing.assert_close(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    )

    keys = torch.cat((torch.arange(64), torch.arange(128, 168)))
    scores = q[0, 0, :64] @ k[0, 0, keys].mT / 8**0.5
    torch.testing.assert_close(lse[0, 0, :64].double(), scores.logsumexp(-1), rtol=0, atol=1e-6)
    assert (lse[0, 0, 64:] == -torch.inf).all()
    assert not lse.requires_grad

    index = torch.tensor([[[[2, 0, -1], [-1, -1, 9]], [[1, 0, 0], [0, 2, 1]]]])
    counts = torch.tensor([[[2, 0], [1, 3]]])
    found = block_sparse_attn_from_indices_reference(q, k, v, index, counts, sizes)
    torch.testing.assert_close(found, (out, lse))


def test_gradients_of_references_are_those_of_differences() -> None:
    tiles = Tiles.from_geometry(2, 5, 3)
    kv = Tiles.from_geometry(1, 3, 9)
    q, gate = random(1, 2, 30, 3), random(1, 2, 30, 3, seed=3)
    k, v = (random(1, 2, 27, 3, seed=seed) for seed in (1, 2))
    index = selected_tiles_reference(q, k, tiles=tiles, kv_tiles=kv, topk=2)

    def vsa(*tensors: Tensor) -> Tensor:
        return ragged_sparse_attn_reference(*tensors, tiles=tiles, kv_tiles=kv, topk=2, index=index)

    assert torch.autograd.gradcheck(vsa, (q, k, v, gate), fast_mode=True)
    assert torch.autograd.gradcheck(vsa, (q, k, v), fast_mode=True)

    block_map = torch.tensor([[[True, False, True]]])
    sizes = torch.tensor([2, 64, 3])
    q, k, v = (random(1, 1, tokens, 2, seed=tokens) for tokens in (64, 192, 192))

    def fine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attn_reference(q, k, v, block_map, sizes)[0]

    assert torch.autograd.gradcheck(fine, (q, k, v), fast_mode=True)


def test_ties_go_to_the_lowest_tile() -> None:
    tiles = Tiles.from_geometry(4, 4, 20)
    q, k = torch.ones(1, 1, 320, 4), torch.ones(1, 1, 320, 4)
    assert (selected_tiles_reference(q, k, tiles=tiles, topk=2) == torch.tensor([0, 1])).all()
    k[:, :, 192:] = 2
    assert (selected_tiles_reference(q, k, tiles=tiles, topk=3) == torch.tensor([0, 3, 4])).all()


def test_half_precision_is_computed_in_float32() -> None:
    tiles = Tiles.from_geometry(3, 5, 6)
    q, k, v = (random(1, 2, 90, 8, seed=seed).detach().bfloat16() for seed in range(3))
    out = ragged_sparse_attn_reference(q, k, v, tiles=tiles, topk=2)
    expected = ragged_sparse_attn_reference(*(x.float() for x in (q, k, v)), tiles=tiles, topk=2)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
