# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention (Zhang et al., 2025, arXiv 2505.13389) with gradients, on CPU and CUDA.

Each tile of up to 64 tokens attends to a few others. Which ones is decided by the *coarse* stage,
attention of the tiles' means to each other; the *fine* stage is softmax attention of tokens to
those of the ``topk`` key tiles with the highest coarse scores. Both outputs are added, the coarse
one, which all tokens of a tile share, times a ``gate``.

Means, scores and the coarse softmax stay float32, where FastVideo rounds them to the dtype of the
input, so that ties between tiles are rare here; where there is one, the lower tile is taken.

B batch, H heads, S query tokens, N key tokens, D channels, Q query tiles, K key tiles. Tensors of
tokens are (B,H,S,D) in tile order (`fastvideo.ops.tiles`) with any strides but a dense last axis;
outputs have the layout of their inputs. Every function has a ``*_reference`` of the same
signature in `fastvideo.ops.vsa_reference`.
"""

import math

from torch import Tensor

from fastvideo.ops import vsa_arguments as arguments
from fastvideo.ops import vsa_coarse, vsa_operators  # noqa: F401  they register operators
from fastvideo.ops.library import operators
from fastvideo.ops.tiles import VSA_TILE_SIZE, Tiles


def num_selected(sparsity: float, num_kv_tiles: int) -> int:
    """Return the ``topk`` that leaves out a share ``sparsity`` of the key tiles, at least 1."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}, expected 0 to 1, the share that is left out")
    return min(max(math.ceil((1 - sparsity) * num_kv_tiles), 1), num_kv_tiles)


def ragged_sparse_attn(  # noqa: PLR0913  a sequence, what describes it, and how sparse
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    tiles: Tiles,
    kv_tiles: Tiles | None = None,
    topk: int,
) -> Tensor:
    """Video Sparse Attention of tokens without padding: no memory and no work is spent on it.

    Args:
        q: (B,H,S,D) queries in tile order.
        k: (B,H,N,D) keys in tile order.
        v: (B,H,N,D) values in tile order.
        gate: (B,H,S,D) factor of the coarse output; without, 1.
        tiles: Those of the queries.
        kv_tiles: Those of keys and values; without, ``tiles``.
        topk: Key tiles that each query tile attends to, see `num_selected`.

    Returns:
        (B,H,S,D) of the dtype of ``q``, or autocast's.

    Raises:
        ValueError: Arguments do not fit together, or there is no kernel for them.
        KernelsMissing: fastvideo was installed without kernels.
    """
    q, k, v, gate = arguments.tokens(q, k, v, gate)
    kv_tiles = kv_tiles or tiles
    arguments.check_tiles(q, k, tiles=tiles, kv_tiles=kv_tiles)
    arguments.check_topk(topk, kv_tiles.num_tiles)
    arguments.check_kernels_take(q, reference="ragged_sparse_attn_reference")
    return _attend(q, k, v, gate, tiles=tiles, kv_tiles=kv_tiles, topk=topk)


def selected_tiles(
    q: Tensor, k: Tensor, *, tiles: Tiles, kv_tiles: Tiles | None = None, topk: int
) -> Tensor:
    """Return which key tiles `ragged_sparse_attn` selects: int32 (B,H,Q,topk), ascending.

    Padded tokens take the tiles of `Tiles.from_block_sizes`.
    """
    q, k, _, _ = arguments.tokens(q, k, k)
    kv_tiles = kv_tiles or tiles
    arguments.check_tiles(q, k, tiles=tiles, kv_tiles=kv_tiles)
    arguments.check_topk(topk, kv_tiles.num_tiles)
    arguments.check_kernels_take(q, reference="selected_tiles_reference")
    return _select(q, k, k, tiles=tiles, kv_tiles=kv_tiles, topk=topk)[0]


def video_sparse_attn(  # noqa: PLR0913  FastVideo's signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int] = VSA_TILE_SIZE,
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """Video Sparse Attention of padded tiles, as ``fastvideo_kernel.video_sparse_attn``.

    Padding slots may hold anything. Those of the output and of all gradients are 0, where FastVideo
    leaves numbers that nothing reads.

    Args:
        q: (B,H,S,D) queries, ``block_size`` slots for each tile.
        k: (B,H,N,D) keys, likewise.
        v: (B,H,N,D) values, likewise.
        variable_block_sizes: Integers (K,), tokens of each key tile.
        q_variable_block_sizes: Integers (Q,), tokens of each query tile.
        topk: Key tiles that each query tile attends to, see `num_selected`.
        block_size: Tokens of a full tile along (T, H, W), at most 64 in all; 64 for (4, 4, 4).
        compress_attn_weight: (B,H,S,D) factor of the coarse output; without, 1.

    Returns:
        (B,H,S,D) of the dtype of ``q``, or autocast's.

    Raises:
        ValueError: Arguments do not fit together, or there is no kernel for them.
        RuntimeError: A block size is out of range; on CUDA, an assertion of the device.
        KernelsMissing: fastvideo was installed without kernels.
    """
    q, k, v, gate = arguments.tokens(q, k, v, compress_attn_weight)
    tiles, kv_tiles = arguments.padded_tiles_of_both(
        q, k, variable_block_sizes, q_variable_block_sizes, block_size
    )
    arguments.check_topk(topk, kv_tiles.num_tiles)
    arguments.check_kernels_take(q, reference="video_sparse_attn_reference")
    return _attend(q, k, v, gate, tiles=tiles, kv_tiles=kv_tiles, topk=topk)


def block_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, variable_block_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Fine stage alone, with the selected tiles as a map; tiles have 64 slots.

    Args:
        q: (B,H,S,D) queries; all slots count, padding or not.
        k: (B,H,N,D) keys.
        v: (B,H,N,D) values.
        block_map: bool (B,H,Q,K), or (H,Q,K) for B = 1: whether a query tile attends to a key tile.
        variable_block_sizes: Integers (K,), 1 to 64: tokens of each key tile.

    Returns:
        The output (B,H,S,D) and the natural log-sum-exp (B,H,S) float32, which has no gradient.
        Queries that attend to nothing have 0 and -inf.

    Raises:
        ValueError: Arguments do not fit together, or there is no kernel for them.
        RuntimeError: A block size is out of range; on CUDA, an assertion of the device.
        KernelsMissing: fastvideo was installed without kernels.
    """
    q, k, v, _ = arguments.tokens(q, k, v)
    tiles = arguments.full_tiles(q)
    kv_tiles = arguments.padded_tiles(k, variable_block_sizes, name="variable_block_sizes")
    block_map = arguments.checked_block_map(q, block_map, tiles=tiles, kv_tiles=kv_tiles)
    arguments.check_kernels_take(q, reference="block_sparse_attn_reference")
    index, counts = operators().vsa_map_to_index(block_map)
    return _fine(q, k, v, index, counts, tiles=tiles, kv_tiles=kv_tiles)


def block_sparse_attn_from_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attn` with the selected tiles as lists.

    Args:
        q: (B,H,S,D) queries; all slots count, padding or not.
        k: (B,H,N,D) keys.
        v: (B,H,N,D) values.
        q2k_idx: Integers (B,H,Q,n): key tiles of each query tile, none twice.
        q2k_num: Integers (B,H,Q): how many of them count, from the first.
        variable_block_sizes: Integers (K,), 1 to 64: tokens of each key tile.

    Returns:
        As `block_sparse_attn`.

    Raises:
        ValueError: Arguments do not fit together, or there is no kernel for them.
        RuntimeError: A value is out of range; on CUDA, an assertion of the device.
        KernelsMissing: fastvideo was installed without kernels.
    """
    q, k, v, _ = arguments.tokens(q, k, v)
    tiles = arguments.full_tiles(q)
    kv_tiles = arguments.padded_tiles(k, variable_block_sizes, name="variable_block_sizes")
    index, counts = arguments.checked_index(q, q2k_idx, q2k_num, tiles=tiles, kv_tiles=kv_tiles)
    arguments.check_kernels_take(q, reference="block_sparse_attn_from_indices_reference")
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
) -> Tensor:
    index, coarse = _select(q, k, v, tiles=tiles, kv_tiles=kv_tiles, topk=topk)
    out: Tensor = operators().vsa_fine_forward(
        q, k, v, index, None, tiles.table, kv_tiles.table, coarse, gate
    )[0]
    return out


def _select(
    q: Tensor, k: Tensor, v: Tensor, *, tiles: Tiles, kv_tiles: Tiles, topk: int
) -> tuple[Tensor, Tensor]:
    """Return selected tiles and the coarse output."""
    scores, coarse, *_ = operators().vsa_coarse(q, k, v, tiles.table, kv_tiles.table)
    return operators().vsa_topk(scores, topk), coarse


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
    out, lse = operators().vsa_fine_forward(
        q, k, v, index, counts, tiles.table, kv_tiles.table, None, None
    )
    return out, lse
