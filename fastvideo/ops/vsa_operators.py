# SPDX-License-Identifier: Apache-2.0
"""Shapes, gradients and FLOPs of the operators vsa_* that csrc/schemas.h declares.

B batch, H heads, S query tokens, N key tokens, D channels, Q query tiles, K key tiles, k tiles
selected for each query tile.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fastvideo.ops.library import empty_rows_like, register


@register
def _register(namespace: str) -> None:
    for name, shapes in _SHAPES.items():
        torch.library.register_fake(f"{namespace}::{name}", shapes)
    operators = getattr(torch.ops, namespace)
    _register_gradients(namespace, operators)
    register_flop_formula(operators.vsa_fine_forward, get_raw=True)(_fine_flops)
    register_flop_formula(operators.vsa_fine_backward, get_raw=True)(_fine_backward_flops)


def _pool(x: Tensor, tiles: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], tiles.shape[0], x.shape[3]), dtype=torch.float32)


def _pool_backward(grad: Tensor, tiles: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((*grad.shape[:2], num_tokens, grad.shape[3]), dtype=dtype)


def _topk(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:3], k), dtype=torch.int32)


def _map_to_index(block_map: Tensor) -> tuple[Tensor, Tensor]:
    index = block_map.new_empty(block_map.shape, dtype=torch.int32)
    return index, block_map.new_empty(block_map.shape[:3], dtype=torch.int32)


def _invert(index: Tensor, counts: Tensor | None, num_kv_tiles: int) -> tuple[Tensor, Tensor]:
    batch, heads, num_q, k = index.shape
    offsets = index.new_empty((batch, heads, num_kv_tiles + 1), dtype=torch.int32)
    return offsets, index.new_empty((batch, heads, num_q * k), dtype=torch.int32)


def _fine_forward(q: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_rows_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fine_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    coarse, gate = rest[-2:]
    return (
        empty_rows_like(q),
        empty_rows_like(k),
        empty_rows_like(v),
        q.new_empty((0,) if coarse is None else coarse.shape, dtype=torch.float32),
        q.new_empty((0,)) if gate is None else empty_rows_like(gate),
    )


_SHAPES: dict[str, Callable[..., Any]] = {
    "vsa_pool": _pool,
    "vsa_pool_backward": _pool_backward,
    "vsa_topk": _topk,
    "vsa_map_to_index": _map_to_index,
    "vsa_invert": _invert,
    "vsa_fine_forward": _fine_forward,
    "vsa_fine_backward": _fine_backward,
}


def _register_gradients(namespace: str, operators: Any) -> None:
    def pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, tiles = inputs
        ctx.num_tokens, ctx.dtype = x.shape[2], x.dtype
        ctx.save_for_backward(tiles)

    def pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tiles,) = ctx.saved_tensors
        return operators.vsa_pool_backward(grad, tiles, ctx.num_tokens, ctx.dtype), None

    def fine_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, lse)

    def fine_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        q, k, v, index, counts, q_tiles, kv_tiles, coarse, gate, out, lse = ctx.saved_tensors
        offsets, rows = operators.vsa_invert(index, counts, kv_tiles.shape[0])
        chosen = (index, counts, offsets, rows, q_tiles, kv_tiles)
        dq, dk, dv, dcoarse, dgate = operators.vsa_fine_backward(
            grad, q, k, v, out, lse, *chosen, coarse, gate
        )
        given = (None if coarse is None else dcoarse, None if gate is None else dgate)
        return dq, dk, dv, None, None, None, None, *given

    autograd = torch.library.register_autograd
    autograd(f"{namespace}::vsa_pool", pool_backward, setup_context=pool_context)
    autograd(f"{namespace}::vsa_fine_forward", fine_backward, setup_context=fine_context)
    autograd(f"{namespace}::vsa_pool_backward", no_second_derivative)
    autograd(f"{namespace}::vsa_fine_backward", no_second_derivative)


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """Refuse to differentiate a backward pass."""
    raise RuntimeError("Video Sparse Attention has no second derivative")


def _fine_flops(q: Tensor, k: Tensor, v: Tensor, *chosen: Any, **_: Any) -> int:
    """Two products of a channel for each query with each key of the selected tiles."""
    index, counts, q_tiles, kv_tiles = chosen[:4]
    return 4 * q.shape[3] * _num_pairs(q, k, index, counts, (q_tiles, kv_tiles))


def _fine_backward_flops(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **_: Any) -> int:
    """Five products, as torch counts the backward pass of dense attention."""
    index, counts, _offsets, _rows, q_tiles, kv_tiles = rest[3:9]
    return 10 * q.shape[3] * _num_pairs(q, k, index, counts, (q_tiles, kv_tiles))


def _num_pairs(
    q: Tensor, k: Tensor, index: Tensor, counts: Tensor | None, tables: tuple[Tensor, Tensor]
) -> int:
    """Count query tokens times key tokens, by a tile's mean size where values are unknown."""
    q_tiles, kv_tiles = tables
    batch, heads, _, width = index.shape
    if index.is_meta or isinstance(index, FakeTensor):
        return batch * heads * q.shape[2] * width * k.shape[2] // kv_tiles.shape[0]
    num_keys = kv_tiles[:, 1][index.long()]
    if counts is not None:
        num_keys = num_keys * (torch.arange(width, device=index.device) < counts[..., None])
    return int((num_keys.sum(dim=-1) * q_tiles[:, 1]).sum())
