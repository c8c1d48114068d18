# SPDX-License-Identifier: Apache-2.0
"""Shapes and gradients of the norms' operators, for torch.compile and autograd.

Arguments and results are those of csrc/schemas.h.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvideo.ops import library
from fastvideo.ops.library import empty_rows_like


def _not_twice(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError(
        "gradients of fused norms cannot be differentiated again: use fastvideo.ops.norm_reference "
        "for second derivatives"
    )


def _layer_forward(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return empty_rows_like(x), *_statistics(x)


def _layer_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *vectors: Tensor | None
) -> tuple[Tensor, ...]:
    return empty_rows_like(x), *(_rows_or_none(vector, x) for vector in vectors)


def _residual_gate_forward(residual: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return empty_rows_like(residual)


def _residual_gate_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows_like(y), empty_rows_like(gate)


def _residual_layer_forward(residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return empty_rows_like(residual), empty_rows_like(residual), *_statistics(residual)


def _residual_layer_backward(
    grad_sum: Tensor, grad: Tensor, y: Tensor, total: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    _, _, gate, *vectors = rest
    of_y = None if gate is None else y
    return empty_rows_like(total), *(
        _rows_or_none(given, total) for given in (of_y, gate, *vectors)
    )


def _rms_forward(
    x: Tensor, weight: Any, cos: Any, sin: Any, across_heads: bool, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], 1 if across_heads else x.shape[2])
    return empty_rows_like(x), x.new_empty(shape, dtype=torch.float32)


def _rms_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return empty_rows_like(x), _rows_or_none(weight, x)


SHAPES: dict[str, Callable[..., Any]] = {
    "layer_forward": _layer_forward,
    "layer_backward": _layer_backward,
    "residual_gate_forward": _residual_gate_forward,
    "residual_gate_backward": _residual_gate_backward,
    "residual_layer_forward": _residual_layer_forward,
    "residual_layer_backward": _residual_layer_backward,
    "rms_forward": _rms_forward,
    "rms_backward": _rms_backward,
}


def _rows_or_none(given: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if given is None else empty_rows_like(given)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return mean, rstd


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *vectors, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, *vectors)


def _layer_gradients(operator: Any) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * 6
        x, mean, rstd, *vectors = ctx.saved_tensors
        of_x, *rest = operator(grad, x, mean, rstd, *vectors)
        return of_x, *_given(rest, vectors), None

    return backward


def _setup_residual_gate(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _residual_gate_gradients(operator: Any) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *operator(grad, *ctx.saved_tensors)

    return backward


def _setup_residual_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, *vectors, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # Without a gate the values of y play no part: what is saved anyway stands in for it.
    ctx.save_for_backward(total if vectors[0] is None else y, total, mean, rstd, *vectors)


def _residual_layer_gradients(operator: Any) -> Callable[..., Any]:
    def backward(ctx: Any, grad_sum: Tensor, grad: Tensor, *_: Any) -> Any:
        y, total, mean, rstd, *vectors = ctx.saved_tensors
        of_residual, of_y, *rest = operator(grad_sum, grad, y, total, mean, rstd, *vectors)
        of_y = of_residual if vectors[0] is None else of_y
        return of_residual, of_y, *_given(rest, vectors), None

    return backward


def _setup_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, cos, sin, ctx.across_heads, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, rstd, weight, cos, sin)


def _rms_gradients(operator: Any) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        if grad is None:
            return (None,) * 6
        x, rstd, weight, cos, sin = ctx.saved_tensors
        of_x, of_weight = operator(grad, x, rstd, weight, cos, sin, ctx.across_heads)
        return of_x, *_given([of_weight], [weight]), None, None, None, None

    return backward


GRADIENTS: dict[str, tuple[Callable[..., None], Callable[[Any], Callable[..., Any]]]] = {
    "layer": (_setup_layer, _layer_gradients),
    "residual_gate": (_setup_residual_gate, _residual_gate_gradients),
    "residual_layer": (_setup_residual_layer, _residual_layer_gradients),
    "rms": (_setup_rms, _rms_gradients),
}


def _given(gradients: list[Tensor], inputs: list[Tensor | None]) -> list[Tensor | None]:
    """None for gradients of what was not given."""
    pairs = zip(gradients, inputs, strict=True)
    return [None if given is None else gradient for gradient, given in pairs]


@library.register
def _register(namespace: str) -> None:
    operators = getattr(torch.ops, namespace)
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"{namespace}::norm_{name}", shapes)
    for name, (setup, gradients) in GRADIENTS.items():
        qualified = f"{namespace}::norm_{name}"
        backward = gradients(getattr(operators, f"norm_{name}_backward"))
        torch.library.register_autograd(f"{qualified}_forward", backward, setup_context=setup)
        torch.library.register_autograd(f"{qualified}_backward", _not_twice)
