# SPDX-License-Identifier: Apache-2.0
"""The coarse stage of Video Sparse Attention: attention of the tiles' means, one row for each tile.

B batch, H heads, Q query tiles, K key tiles, D channels. The (B,H,Q,K) probabilities are not kept
for the backward pass, which computes them again. An operator of its own says so to torch.compile,
which would otherwise find both computations equal and keep the first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("fastvideo::vsa_coarse", mutates_args=())
def coarse_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of means, in their own precision under autocast too.

    Args:
        q: (B,H,Q,D) means of the query tiles.
        k: (B,H,K,D) means of the key tiles.
        v: (B,H,K,D) means of the value tiles.

    Returns:
        Scores (B,H,Q,K), which have no gradient, and the output (B,H,Q,D).
    """
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, k)
        return scores, scores.softmax(dim=-1) @ v


@torch.library.custom_op("fastvideo::vsa_coarse_backward", mutates_args=())
def _coarse_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        probabilities = _scores(q, k).softmax(dim=-1)
        dv = probabilities.mT @ grad
        dscores = grad @ v.mT
        dscores.sub_((grad * out).sum(dim=-1, keepdim=True)).mul_(probabilities)
        del probabilities
        scale = q.shape[-1] ** -0.5
        return (dscores @ k).mul_(scale), (dscores.mT @ q).mul_(scale), dv


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q * q.shape[-1] ** -0.5, k.mT)


@coarse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], k.shape[2])), q.new_empty(q.shape)


@_coarse_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, out = output
    ctx.mark_non_differentiable(scores)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, out)


def _backward(ctx: Any, _: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    grads: tuple[Tensor, ...] = _coarse_backward(grad, *ctx.saved_tensors)
    return grads


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("Video Sparse Attention has no second derivative")


coarse_attention.register_autograd(_backward, setup_context=_setup_context)
_coarse_backward.register_autograd(_no_second_derivative)


@register_flop_formula(torch.ops.fastvideo.vsa_coarse)
def _coarse_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, num_q, channels = q
    return int(4 * batch * heads * num_q * k[2] * channels)


@register_flop_formula(torch.ops.fastvideo.vsa_coarse_backward)
def _coarse_backward_flops(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return _coarse_flops(q, k) * 5 // 2
