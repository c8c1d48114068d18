# SPDX-License-Identifier: Apache-2.0
"""What the faces and references of Video Sparse Attention ask of their arguments.

Nothing here waits for a device: values of tensors are asserted on it, everything else is a
ValueError that says what to change. Axes are those of `fastvideo.ops.vsa`.
"""

import math

import torch
from torch import Tensor

from fastvideo.ops.tiles import MAX_TOKENS, Tiles

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_HEAD_DIMS = (64, 128)
MAX_HEAD_DIM = 256


def tokens(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors of tokens as autocast wants them; shapes, dtypes and devices agree."""
    if q.dim() != 4 or k.dim() != 4:
        name, tensor = ("q", q) if q.dim() != 4 else ("k", k)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected four axes (B, H, S, D)")
    q, k, v, gate = (
        _autocast(q),
        _autocast(k),
        _autocast(v),
        gate if gate is None else _autocast(gate),
    )
    keys = (q.shape[0], q.shape[1], k.shape[2], q.shape[3])
    _check_like("k", k, keys, q)
    _check_like("v", v, keys, q)
    if gate is not None:
        _check_like("gate", gate, tuple(q.shape), q)
    return q, k, v, gate


def _autocast(tensor: Tensor) -> Tensor:
    """Cast as torch does for scaled_dot_product_attention under autocast: float64 stays."""
    device = tensor.device.type
    # torch 2.11 cannot compile torch.amp.is_autocast_available; meta has no autocast.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        hint = ""
        if tensor.dim() == 4 and tensor.shape[1] != shape[1]:
            hint = "; as many heads as q: repeat those of keys and values that are shared"
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {shape} for q of shape "
            f"{tuple(q.shape)}{hint}"
        )
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name} is {tensor.dtype} and q {q.dtype}: cast one of them")
    _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device} and q on {q.device}: move one of them")


def check_kernels_take(q: Tensor, *, reference: str) -> None:
    """There is a kernel for this dtype and head dimension on this device.

    Args:
        q: Queries.
        reference: Name of the function that takes everything.
    """
    instead = f"cast to bfloat16, or use fastvideo.ops.{reference}, which is slow"
    dtypes = CUDA_DTYPES if q.is_cuda else CPU_DTYPES
    if q.dtype not in dtypes:
        raise ValueError(
            f"q is {q.dtype}; on {q.device.type} there are kernels for "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}: {instead}"
        )
    head_dim = q.shape[3]
    if q.is_cuda and head_dim not in CUDA_HEAD_DIMS:
        raise ValueError(
            f"q has head dimension {head_dim}; on cuda there are kernels for 64 and 128: use "
            f"fastvideo.ops.{reference}, which is slow"
        )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q has head dimension {head_dim}, expected 1 to {MAX_HEAD_DIM}")


def check_tiles(q: Tensor, k: Tensor, *, tiles: Tiles, kv_tiles: Tiles) -> None:
    """Tiles describe these tokens."""
    for name, of, x, described in (("tiles", "q", q, tiles), ("kv_tiles", "k", k, kv_tiles)):
        if described.num_tokens != x.shape[2]:
            raise ValueError(
                f"{name} describes {described.num_tokens} tokens, {of} has {x.shape[2]}"
            )
        if described.table.device != x.device:
            raise ValueError(
                f"{name} is on {described.table.device} and {of} on {x.device}: make it with "
                f"device={of}.device"
            )


def check_topk(topk: int, num_kv_tiles: int) -> None:
    """``topk`` tiles can be selected."""
    if not 1 <= topk <= num_kv_tiles:
        raise ValueError(f"topk is {topk}, expected 1 to {num_kv_tiles}, the number of key tiles")


def padded_tiles_of_both(
    q: Tensor,
    k: Tensor,
    kv_sizes: Tensor,
    q_sizes: Tensor,
    block_size: int | tuple[int, int, int],
) -> tuple[Tiles, Tiles]:
    """Tiles of queries and of keys, from the arguments of ``video_sparse_attn``."""
    slots = _slots_of(block_size)
    kv_tiles = padded_tiles(k, kv_sizes, name="variable_block_sizes", slots=slots)
    if q_sizes is kv_sizes and q.shape[2] == k.shape[2]:
        return kv_tiles, kv_tiles
    return padded_tiles(q, q_sizes, name="q_variable_block_sizes", slots=slots), kv_tiles


def _slots_of(block_size: int | tuple[int, ...]) -> int:
    """Return the tokens of a full tile: an integer is their number, or 4 for (4, 4, 4)."""
    if isinstance(block_size, int):
        # FastVideo's documentation has 64 tokens in mind, its code 64 along each axis.
        slots = {4: 64, 64: 64}.get(block_size, 0)
    else:
        slots = math.prod(block_size) if len(block_size) == 3 and min(block_size) > 0 else 0
    if not 1 <= slots <= MAX_TOKENS:
        raise ValueError(
            f"block_size is {block_size}, expected three numbers whose product is at most "
            f"{MAX_TOKENS}: (4, 4, 4)"
        )
    return slots


def padded_tiles(x: Tensor, sizes: Tensor, *, name: str, slots: int = MAX_TOKENS) -> Tiles:
    """Tiles of ``x`` with ``slots`` each, the first ``sizes`` of which are tokens."""
    num_slots = x.shape[2]
    if sizes.dim() != 1 or sizes.shape[0] * slots != num_slots:
        raise ValueError(
            f"{name} has shape {tuple(sizes.shape)}, expected one number for every {slots} of "
            f"{num_slots} tokens"
        )
    _check_device(name, sizes, x)
    return Tiles.from_block_sizes(sizes, slots)


def full_tiles(x: Tensor) -> Tiles:
    """Tiles of 64 tokens, all of which count."""
    if x.shape[2] % MAX_TOKENS:
        raise ValueError(f"q has {x.shape[2]} tokens, expected a multiple of {MAX_TOKENS}")
    first = torch.arange(0, x.shape[2], MAX_TOKENS, dtype=torch.int32, device=x.device)
    return Tiles(torch.stack((first, torch.full_like(first, MAX_TOKENS)), dim=1), x.shape[2])


def checked_index(
    q: Tensor, index: Tensor, counts: Tensor, *, tiles: Tiles, kv_tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Return ``q2k_idx`` and ``q2k_num`` as int32; their values are asserted on the device."""
    rows = (q.shape[0], q.shape[1], tiles.num_tiles)
    width = index.shape[-1] if index.dim() == 4 else 0
    _check_integers("q2k_idx", index, (*rows, width), q)
    _check_integers("q2k_num", counts, rows, q)
    if not 1 <= width <= kv_tiles.num_tiles:
        raise ValueError(
            f"q2k_idx has {width} columns, expected 1 to {kv_tiles.num_tiles}, the number of key "
            "tiles"
        )
    torch._assert_async(
        ((counts >= 0) & (counts <= width)).all(),
        f"q2k_num must be 0 to {width}, the columns of q2k_idx",
    )
    unused = torch.arange(width, device=index.device) >= counts[..., None]
    torch._assert_async(
        (((index >= 0) & (index < kv_tiles.num_tiles)) | unused).all(),
        f"q2k_idx must be 0 to {kv_tiles.num_tiles - 1}, as there are {kv_tiles.num_tiles} key "
        "tiles",
    )
    # Past a row's count may be anything, such as -1, which the kernels would refuse.
    return index.masked_fill(unused, 0).to(torch.int32), counts.to(torch.int32)


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {tensor.dtype}, expected int32")
    _check_device(name, tensor, q)


def checked_block_map(q: Tensor, block_map: Tensor, *, tiles: Tiles, kv_tiles: Tiles) -> Tensor:
    """Return ``block_map`` as bool (B,H,Q,K)."""
    if block_map.dim() == 3:
        block_map = block_map[None]
    shape = (q.shape[0], q.shape[1], tiles.num_tiles, kv_tiles.num_tiles)
    if tuple(block_map.shape) != shape:
        raise ValueError(f"block_map has shape {tuple(block_map.shape)}, expected {shape}")
    _check_device("block_map", block_map, q)
    return block_map.to(torch.bool)
