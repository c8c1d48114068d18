# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention in plain torch: any device, dtype and head dimension, with autograd.

What the kernels are held against, and the way out where there is none. Each query tile gathers its
key tiles, so work and memory are those of sparse attention; it is slow because tiles are walked in
Python. float16 and bfloat16 are computed in float32. Axes are those of `fastvideo.ops.vsa`.

Where coarse scores nearly tie, two right implementations may select different tiles. ``index``,
from `fastvideo.ops.selected_tiles`, makes what follows comparable.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.ops import vsa_arguments as arguments
from fastvideo.ops.tiles import MAX_TOKENS, VSA_TILE_SIZE, Tiles


def ragged_sparse_attn_reference(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    tiles: Tiles,
    kv_tiles: Tiles | None = None,
    topk: int,
    index: Tensor | None = None,
) -> Tensor:
    """`fastvideo.ops.ragged_sparse_attn`; ``index``: tiles to attend to instead of ``topk``."""
    q, k, v, gate = arguments.tokens(q, k, v, gate)
    kv_tiles = kv_tiles or tiles
    arguments.check_tiles(q, k, tiles=tiles, kv_tiles=kv_tiles)
    arguments.check_topk(topk, kv_tiles.num_tiles)
    return _attend(q, k, v, gate, tiles=tiles, kv_tiles=kv_tiles, topk=topk, index=index)


def selected_tiles_reference(
    q: Tensor, k: Tensor, *, tiles: Tiles, kv_tiles: Tiles | None = None, topk: int
) -> Tensor:
    """`fastvideo.ops.selected_tiles`."""
    q, k, _, _ = arguments.tokens(q, k, k)
    kv_tiles = kv_tiles or tiles
    arguments.check_tiles(q, k, tiles=tiles, kv_tiles=kv_tiles)
    arguments.check_topk(topk, kv_tiles.num_tiles)
    return _highest(_scores(_precise(q), _precise(k), tiles=tiles, kv_tiles=kv_tiles), topk)


def video_sparse_attn_reference(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int] = VSA_TILE_SIZE,
    compress_attn_weight: Tensor | None = None,
    *,
    index: Tensor | None = None,
) -> Tensor:
    """`fastvideo.ops.video_sparse_attn`; ``index``: tiles to attend to instead of ``topk``."""
    q, k, v, gate = arguments.tokens(q, k, v, compress_attn_weight)
    tiles, kv_tiles = arguments.padded_tiles_of_both(
        q, k, variable_block_sizes, q_variable_block_sizes, block_size
    )
    arguments.check_topk(topk, kv_tiles.num_tiles)
    return _attend(q, k, v, gate, tiles=tiles, kv_tiles=kv_tiles, topk=topk, index=index)


def block_sparse_attn_reference(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, variable_block_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """`fastvideo.ops.block_sparse_attn`."""
    q, k, v, _ = arguments.tokens(q, k, v)
    tiles = arguments.full_tiles(q)
    kv_tiles = arguments.padded_tiles(k, variable_block_sizes, name="variable_block_sizes")
    block_map = arguments.checked_block_map(q, block_map, tiles=tiles, kv_tiles=kv_tiles)
    index = block_map.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return _fine(q, k, v, index, block_map.sum(dim=-1), tiles=tiles, kv_tiles=kv_tiles)


def block_sparse_attn_from_indices_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """`fastvideo.ops.block_sparse_attn_from_indices`."""
    q, k, v, _ = arguments.tokens(q, k, v)
    tiles = arguments.full_tiles(q)
    kv_tiles = arguments.padded_tiles(k, variable_block_sizes, name="variable_block_sizes")
    index, counts = arguments.checked_index(q, q2k_idx, q2k_num, tiles=tiles, kv_tiles=kv_tiles)
    return _fine(q, k, v, index, counts, tiles=tiles, kv_tiles=kv_tiles)


def _attend(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    *,
    tiles: Tiles,
    kv_tiles: Tiles,
    topk: int,
    index: Tensor | None,
) -> Tensor:
    precise_q, precise_k, precise_v = _precise(q), _precise(k), _precise(v)
    scores = _scores(precise_q, precise_k, tiles=tiles, kv_tiles=kv_tiles)
    coarse = _product(scores.softmax(dim=-1), _means(precise_v, kv_tiles))
    if index is None:
        index = _highest(scores, topk)
    counts = torch.full(index.shape[:3], index.shape[3], device=q.device)
    fine, _ = _fine(precise_q, precise_k, precise_v, index, counts, tiles=tiles, kv_tiles=kv_tiles)
    shared = _spread(coarse, tiles)
    return (fine + (shared if gate is None else shared * _precise(gate))).to(q.dtype)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(x: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return (B,H,tiles,64,D) with 0 past each tile's tokens, and bool (tiles,64): its tokens."""
    first, num_tokens = tiles.table.long().unbind(dim=1)
    slots = torch.arange(MAX_TOKENS, device=x.device)
    valid = slots < num_tokens[:, None]
    tokens = torch.where(valid, first[:, None] + slots, 0)
    return torch.where(valid[..., None], x[:, :, tokens], 0), valid


def _means(x: Tensor, tiles: Tiles) -> Tensor:
    return _blocks(x, tiles)[0].sum(dim=3) / tiles.table[:, 1:]


def _scores(q: Tensor, k: Tensor, *, tiles: Tiles, kv_tiles: Tiles) -> Tensor:
    scale: float = q.shape[-1] ** -0.5
    return _product(_means(q, tiles), _means(k, kv_tiles).mT) * scale


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in the precision of its factors, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)


def _highest(scores: Tensor, topk: int) -> Tensor:
    """Indices of the highest, ascending; of equal scores the first."""
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    ascending: Tensor = order[..., :topk].sort(dim=-1).values
    return ascending.to(torch.int32)


def _spread(rows: Tensor, tiles: Tiles) -> Tensor:
    """(B,H,tiles,D) to (B,H,S,D): a tile's row for each of its tokens, 0 for padding."""
    first, num_tokens = tiles.table.long().unbind(dim=1)
    token = torch.arange(tiles.num_tokens, device=rows.device)
    tile = (torch.searchsorted(first.contiguous(), token, right=True) - 1).clamp(min=0)
    inside = (token >= first[tile]) & (token < (first + num_tokens)[tile])
    return torch.where(inside[:, None], rows[:, :, tile], 0)


def _fine(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    counts: Tensor,
    *,
    tiles: Tiles,
    kv_tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Attention of each query tile to the first ``counts`` of its key tiles ``index``."""
    keys, valid = _blocks(_precise(k), kv_tiles)
    values, _ = _blocks(_precise(v), kv_tiles)
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    head = torch.arange(q.shape[1], device=q.device)[:, None]
    chosen_first = torch.arange(index.shape[3], device=q.device)
    table = tiles.table.tolist()
    ends = [first for first, _ in table[1:]] + [tiles.num_tokens]
    outs, log_sums = [], []
    done = 0
    for tile, (first, num_tokens) in enumerate(table):
        chosen = index[:, :, tile].long()
        counted = chosen_first < counts[:, :, tile, None]
        takes_part = (valid[chosen] & counted[..., None]).flatten(2)[:, :, None]
        attends = takes_part.any(dim=-1, keepdim=True)
        rows = _precise(q[:, :, first : first + num_tokens])
        scores = _product(rows, keys[batch, head, chosen].flatten(2, 3).mT) * q.shape[3] ** -0.5
        # A softmax of nothing but -inf is NaN, and so is its gradient.
        scores = scores.masked_fill(~takes_part & attends, -torch.inf)
        weights = scores.softmax(dim=-1) * attends
        padding = (first - done, ends[tile] - first - num_tokens)
        out = _product(weights, values[batch, head, chosen].flatten(2, 3))
        outs.append(F.pad(out, (0, 0, *padding)))
        log_sum = scores.detach().logsumexp(dim=-1).masked_fill(~attends[..., 0], -torch.inf)
        log_sums.append(F.pad(log_sum, padding, value=-torch.inf))
        done = ends[tile]
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(log_sums, dim=2).to(torch.float32)
