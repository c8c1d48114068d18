# SPDX-License-Identifier: Apache-2.0
"""Layer norm with modulation and gated residual, RMS norm with rotary positions, in one pass each.

Axes: B batch, S tokens, D model dimension, G runs of S / G consecutive tokens that share a
modulation, F latent frames (a kind of run), H heads, K head dimension.

Tokens are float32, bfloat16 or float16; weights, biases and modulations are of their dtype or
float32. Numbers are float32 in between and are rounded once, at the end. Results have the dtype of
the tokens, under autocast too: torch's own norms return float32 there, which the next projection
casts back. `fastvideo.ops.norm_reference` has the same functions in plain torch.
"""

from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn

from fastvideo.errors import UserError
from fastvideo.ops import library, norm_autograd  # noqa: F401  gradients of the operators

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_norm(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
) -> Tensor:
    """``(norm(x) * weight + bias) * (1 + scale) + shift``, norm to mean 0 and variance 1 over D.

    Args:
        x: (B, S, D); without modulation any (..., D).
        weight: (D,); without: 1.
        bias: (D,); without: 0.
        scale: (B, G, D), or (B, G, 1, D) as diffusers gives those of latent frames; a batch of 1
            serves all samples. Without: 0.
        shift: The same.
        eps: Added to the variance.

    Raises:
        UserError: Shapes or dtypes do not fit.
    """
    _check_tokens(x)
    scale, shift = _modulations(x, {"scale": scale, "shift": shift})
    rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
    _check_vectors(x, {"weight": weight, "bias": bias}, x.shape[-1])
    out: Tensor = library.operators().norm_layer_forward(rows, weight, bias, scale, shift, eps)[0]
    return out.reshape(x.shape)


def residual_gate(residual: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``residual + y * gate``.

    Args:
        residual: (B, S, D).
        y: The same shape and dtype.
        gate: As ``scale`` of `layer_norm`.

    Raises:
        UserError: Shapes or dtypes do not fit.
    """
    _check_same(residual, y)
    (vectors,) = _modulations(residual, {"gate": gate})
    out: Tensor = library.operators().norm_residual_gate_forward(residual, y, vectors)
    return out


def residual_gate_layer_norm(  # noqa: PLR0913  two operations in one
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
    """Return ``residual + y * gate``, and `layer_norm` of it as it was rounded.

    Args:
        residual: (B, S, D).
        y: The same shape and dtype.
        gate: As ``scale`` of `layer_norm`; without: 1.
        weight: See `layer_norm`, as what follows.
        bias: (D,).
        scale: With as many runs as ``gate``.
        shift: The same.
        eps: Added to the variance.

    Raises:
        UserError: Shapes or dtypes do not fit.
    """
    _check_same(residual, y)
    _check_vectors(residual, {"weight": weight, "bias": bias}, residual.shape[-1])
    modulations = {"gate": gate, "scale": scale, "shift": shift}
    gate, scale, shift = _modulations(residual, modulations)
    total, normed, _, _ = library.operators().norm_residual_layer_forward(
        residual, y, gate, weight, bias, scale, shift, eps
    )
    return total, normed


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    Args:
        x: (..., D).
        weight: (D,); without: 1.
        eps: Added to the mean square.

    Raises:
        UserError: Shapes or dtypes do not fit.
    """
    _check_tokens(x)
    _check_vectors(x, {"weight": weight}, x.shape[-1])
    # Four axes keep their strides: heads of (B, H, S, K) tensors are not copied.
    heads = x if x.ndim == 4 else x.reshape(1, -1, 1, x.shape[-1])
    out: Tensor = library.operators().norm_rms_forward(heads, weight, None, None, False, eps)[0]
    return out.reshape(x.shape)


def rms_norm_rotary(
    x_BSHK: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    across_heads: bool,
) -> Tensor:
    """`rms_norm`, then neighbouring pairs of channels turned by their angles (Su et al., 2021).

    Args:
        x_BSHK: Queries or keys, as their projection gives them.
        weight: (K,), or (H * K,) with ``across_heads``; without: 1.
        cos: float32 (S, K / 2), or as diffusers has it with every angle twice in a row: (S, K) or
            (1, S, 1, K). A constant: no gradient is computed.
        sin: The same.
        eps: Added to the mean square.
        across_heads: Normalise all heads of a token together, as Wan does, instead of each.

    Raises:
        UserError: Shapes or dtypes do not fit.
    """
    _check_tokens(x_BSHK)
    if x_BSHK.ndim != 4:
        raise UserError(f"x has shape {_shape(x_BSHK)}: give (B, S, H, K)")
    num_channels = x_BSHK.shape[3] * (x_BSHK.shape[2] if across_heads else 1)
    _check_vectors(x_BSHK, {"weight": weight}, num_channels)
    cos, sin = _angles(x_BSHK, "cos", cos), _angles(x_BSHK, "sin", sin)
    out: Tensor = library.operators().norm_rms_forward(x_BSHK, weight, cos, sin, across_heads, eps)[
        0
    ]
    return out


class FusedLayerNorm(nn.LayerNorm):
    """In the place of apex's ``FusedLayerNorm`` and of ``torch.nn.LayerNorm``."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(_size(normalized_shape), eps=eps, elementwise_affine=elementwise_affine)
        _refuse_memory_efficient(memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimensions of ``input``."""
        weight, bias = (_flat(vector) for vector in (self.weight, self.bias))
        rows = _flat_channels(input, self.normalized_shape)
        return layer_norm(rows, weight=weight, bias=bias, eps=self.eps).reshape(input.shape)


class FusedRMSNorm(nn.RMSNorm):
    """In the place of apex's ``FusedRMSNorm`` and of ``torch.nn.RMSNorm``.

    As in torch, ``eps=None`` is the machine epsilon of the input's dtype.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(_size(normalized_shape), eps=eps, elementwise_affine=elementwise_affine)
        _refuse_memory_efficient(memory_efficient)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimensions of ``x``."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        rows = _flat_channels(x, self.normalized_shape)
        return rms_norm(rows, _flat(self.weight), eps).reshape(x.shape)


def _size(shape: int | Sequence[int]) -> Size:
    return Size([shape] if isinstance(shape, int) else shape)


def _refuse_memory_efficient(memory_efficient: bool) -> None:
    if memory_efficient:
        raise UserError(
            "memory_efficient=True: gradients here need the input of a norm; leave it out, and "
            "recompute activations if memory is short"
        )


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.flatten()


def _flat_channels(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise UserError(
            f"the input has shape {_shape(x)}, which does not end in normalized_shape "
            f"{tuple(shape)}"
        )
    return x if len(shape) == 1 else x.flatten(-len(shape))


def _modulations(x_BSD: Tensor, given: dict[str, Tensor | None]) -> list[Tensor | None]:
    """View modulations as (B, G, D), all of the same G."""
    views = {name: v if v is None else _modulation(x_BSD, name, v) for name, v in given.items()}
    runs = {name: view.shape[1] for name, view in views.items() if view is not None}
    if len(set(runs.values())) > 1:
        raise UserError(f"numbers of runs differ: {runs}: give all modulations the same")
    return list(views.values())


def _modulation(x_BSD: Tensor, name: str, given: Tensor) -> Tensor:
    """View a modulation as (B, G, D)."""
    if x_BSD.ndim != 3:
        raise UserError(f"x has shape {_shape(x_BSD)}: give (B, S, D) where there is a {name}")
    batch, num_tokens, dim = x_BSD.shape
    vectors = given.squeeze(2) if given.ndim == 4 else given
    fits = vectors.ndim == 3 and vectors.shape[0] in (1, batch) and vectors.shape[2] == dim
    if not fits or vectors.shape[1] == 0 or num_tokens % vectors.shape[1]:
        raise UserError(
            f"{name} has shape {_shape(given)}: give ({batch}, G, {dim}) or ({batch}, G, 1, {dim}) "
            f"with a G that divides the {num_tokens} tokens"
        )
    _check_dtype(x_BSD, name, vectors)
    return vectors.expand(batch, -1, -1)


def _angles(x_BSHK: Tensor, name: str, given: Tensor) -> Tensor:
    """View a table of cosines or sines as (S, K / 2)."""
    num_tokens, dim = x_BSHK.shape[1], x_BSHK.shape[3]
    table = given[0, :, 0] if given.ndim == 4 and given.shape[::2] == (1, 1) else given
    fits = table.ndim == 2 and table.shape[0] == num_tokens and table.shape[1] in (dim, dim // 2)
    if not fits or dim % 2 or table.dtype != torch.float32:
        raise UserError(
            f"{name} is {_shape(given)} {given.dtype}: give ({num_tokens}, {dim // 2}), or "
            f"({num_tokens}, {dim}) or (1, {num_tokens}, 1, {dim}) with each angle twice, float32, "
            "and an even number of channels"
        )
    return table[:, ::2] if table.shape[1] == dim else table


def _check_tokens(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise UserError(f"x is {x.dtype}: cast it to float32, bfloat16 or float16")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UserError(f"x has shape {_shape(x)}: give (..., D) with channels")


def _check_same(residual: Tensor, y: Tensor) -> None:
    _check_tokens(residual)
    if y.shape != residual.shape or y.dtype != residual.dtype or y.ndim != 3:
        raise UserError(
            f"y is {_shape(y)} {y.dtype} and residual {_shape(residual)} {residual.dtype}: give "
            "both as (B, S, D) of one dtype"
        )


def _check_vectors(x: Tensor, vectors: dict[str, Tensor | None], size: int) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != (size,):
            raise UserError(f"{name} has shape {_shape(vector)}: give ({size},)")
        _check_dtype(x, name, vector)


def _check_dtype(x: Tensor, name: str, vector: Tensor) -> None:
    if vector.dtype not in (x.dtype, torch.float32):
        raise UserError(f"{name} is {vector.dtype}: cast it to float32 or to x's {x.dtype}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
