# SPDX-License-Identifier: Apache-2.0
"""The coarse stage of Video Sparse Attention: attention of the tiles' means to each other.

B batch, H heads, S query tokens, N key tokens, Q query tiles, K key tiles, D channels.

It is an operator in Python, so that its (B,H,Q,K) probabilities are never kept for the backward
pass, which computes them again: torch.compile would find both computations equal in code it can
see, and keep the first. Means, pooled by kernels, and all that follows are float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastvideo.ops.library import register
from fastvideo.ops.vsa_operators import no_second_derivative

Means = tuple[Tensor, Tensor, Tensor]
"""Of queries (B,H,Q,D), keys and values (B,H,K,D)."""


def attend(means: Means) -> tuple[Tensor, Tensor]:
    """Return scores (B,H,Q,K) and output (B,H,Q,D), in the means' precision under autocast too."""
    with torch.autocast(means[0].device.type, enabled=False):
        scores = _scores(means)
        return scores, torch.matmul(scores.softmax(dim=-1), means[2])


def attend_backward(grad: Tensor, means: Means, out: Tensor) -> Means:
    """Return the gradients of the means for that of the output ``out`` of `attend`."""
    q, k, v = means
    scale = q.shape[-1] ** -0.5
    with torch.autocast(q.device.type, enabled=False):
        probabilities = _scores(means).softmax(dim=-1)
        dv = probabilities.mT @ grad
        dscores = grad @ v.mT
        dscores.sub_((grad * out).sum(dim=-1, keepdim=True)).mul_(probabilities)
        del probabilities
        return (dscores @ k).mul_(scale), (dscores.mT @ q).mul_(scale), dv


def _scores(means: Means) -> Tensor:
    q, k, _ = means
    return torch.matmul(q * q.shape[-1] ** -0.5, k.mT)


_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor q_tiles, Tensor kv_tiles) -> "
    "(Tensor scores, Tensor out, Tensor q_means, Tensor k_means, Tensor v_means)"
)
_BACKWARD = (
    "(Tensor grad, Tensor q_means, Tensor k_means, Tensor v_means, Tensor out) -> "
    "(Tensor, Tensor, Tensor)"
)


@register
def _register(namespace: str) -> None:
    operators = getattr(torch.ops, namespace)

    def forward(q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, kv_tiles: Tensor) -> Any:
        pool = operators.vsa_pool
        means = pool(q, q_tiles), pool(k, kv_tiles), pool(v, kv_tiles)
        return *attend(means), *means

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        *tokens, q_tiles, kv_tiles = inputs
        scores, out, *means = output
        ctx.mark_non_differentiable(scores, *means)
        ctx.set_materialize_grads(False)
        ctx.tokens = [(x.shape[2], x.dtype) for x in tokens]
        ctx.save_for_backward(*means, out, q_tiles, kv_tiles)

    def backward(ctx: Any, _: None, grad: Tensor | None, *__: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        *means_and_out, q_tiles, kv_tiles = ctx.saved_tensors
        grads = operators.vsa_coarse_backward(grad, *means_and_out)
        tables = q_tiles, kv_tiles, kv_tiles
        of_tokens = [
            operators.vsa_pool_backward(mean, tiles, *tokens)
            for mean, tiles, tokens in zip(grads, tables, ctx.tokens, strict=True)
        ]
        return *of_tokens, None, None

    name = f"{namespace}::vsa_coarse"
    torch.library.define(name, _FORWARD)
    torch.library.impl(name, "default", forward)
    torch.library.register_fake(name, _forward_shapes)
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    register_flop_formula(operators.vsa_coarse)(_forward_flops)

    name = f"{namespace}::vsa_coarse_backward"
    torch.library.define(name, _BACKWARD)
    torch.library.impl(name, "default", _backward)
    torch.library.register_fake(name, _backward_shapes)
    torch.library.register_autograd(name, no_second_derivative)
    register_flop_formula(operators.vsa_coarse_backward)(_backward_flops)


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, q_tiles: Tensor, kv_tiles: Tensor
) -> tuple[Tensor, ...]:
    num_q, num_kv, channels = q_tiles.shape[0], kv_tiles.shape[0], q.shape[3]
    last = (num_q, num_kv), *((n, channels) for n in (num_q, num_q, num_kv, num_kv))
    return tuple(q.new_empty((*q.shape[:2], *axes), dtype=torch.float32) for axes in last)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Means:
    return attend_backward(grad, (q, k, v), out)


def _backward_shapes(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Means:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _forward_flops(q: Any, k: Any, v: Any, q_tiles: Any, kv_tiles: Any, **_: Any) -> int:
    """Two products, by shapes."""
    batch, heads, _tokens, channels = q
    return int(4 * batch * heads * q_tiles[0] * kv_tiles[0] * channels)


def _backward_flops(grad: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    """Five products, one of them computed again."""
    batch, heads, num_q, channels = q
    return int(10 * batch * heads * num_q * k[2] * channels)
