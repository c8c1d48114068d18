# SPDX-License-Identifier: Apache-2.0
"""The norms of `fastvideo.ops.norm` in plain torch: what they mean, in any precision.

Numbers are at least float32 in between, float64 for float64 tokens. Axes and arguments are those of
`fastvideo.ops.norm`; modulations are (B, G, D), cos and sin (S, K / 2).
"""

import torch
from torch import Tensor


def layer_norm_reference(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
) -> Tensor:
    """``(norm(x) * weight + bias) * (1 + scale) + shift``."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    if scale is not None:
        out = out * (1 + _per_token(scale, x))
    if shift is not None:
        out = out + _per_token(shift, x)
    return out.to(x.dtype)


def residual_gate_reference(residual: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``residual + y * gate``."""
    return (_wide(residual) + _wide(y) * _per_token(gate, y)).to(residual.dtype)


def residual_gate_layer_norm_reference(  # noqa: PLR0913  two operations in one
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``residual + y * gate`` and `layer_norm_reference` of it."""
    total = residual + y if gate is None else residual_gate_reference(residual, y, gate)
    normed = layer_norm_reference(
        total, weight=weight, bias=bias, scale=scale, shift=shift, eps=eps
    )
    return total, normed


def rms_norm_reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight``."""
    return _rms(x, weight, eps).to(x.dtype)


def rms_norm_rotary_reference(
    x_BSHK: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    across_heads: bool,
) -> Tensor:
    """`rms_norm_reference`, then pairs of channels (a, b) become (a cos - b sin, a sin + b cos)."""
    if across_heads:
        normed = _rms(x_BSHK.flatten(2), weight, eps).unflatten(2, x_BSHK.shape[2:])
    else:
        normed = _rms(x_BSHK, weight, eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BSHK.dtype)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = _wide(x)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_token(vectors_BGD: Tensor, x_BSD: Tensor) -> Tensor:
    return vectors_BGD.repeat_interleave(x_BSD.shape[1] // vectors_BGD.shape[1], dim=1)
