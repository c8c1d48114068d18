# SPDX-License-Identifier: Apache-2.0
"""Fused norms' CUDA kernels on a GPU, against float64 references, values and every gradient."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo import ops

DEVICE = "cuda"
EPS = 1e-6
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = tuple(LARGEST_ERROR)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that outputs will be given holds NaN, so that what is not written shows."""
    torch.cuda.empty_cache()
    block = torch.full((256 * 2**20,), torch.nan, device=DEVICE)
    del block
    yield


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype).requires_grad_()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def check(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Tensor],
    **options: Any,
) -> None:
    """Compare outputs and the gradients of ``inputs``; then the bits of a second run."""
    dtype = next(iter(inputs.values())).dtype
    runs = [outcome(function, inputs, options) for _ in range(2)]
    precise = {
        name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()
    }
    expected = outcome(reference, precise, options)
    errors = {name: relative(x, expected[name]) for name, x in runs[0].items()}
    assert max(errors.values()) < LARGEST_ERROR[dtype], errors
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


def outcome(
    function: Callable[..., Any], inputs: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    outs = function(**inputs, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    found = {f"out{i}": out for i, out in enumerate(outs)}
    needed = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = [
        numbers(*out.shape, dtype=torch.float32, seed=100 + i).detach().to(out.dtype)
        for i, out in enumerate(outs)
    ]
    gradients = torch.autograd.grad(outs, tuple(needed.values()), grads)
    return found | dict(zip(needed, gradients, strict=True))


SIZES = [
    pytest.param(2, 78, 1536, id="2x78x1536"),
    pytest.param(1, 780, 5120, id="1x780x5120"),
    pytest.param(1, 39, 3072, id="1x39x3072"),
    pytest.param(3, 13, 100, id="3x13x100"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulation", [torch.float32, None], ids=["float32", "as x"])
@pytest.mark.parametrize("runs", [1, 13, "all"])
@pytest.mark.parametrize(("batch", "length", "channels"), SIZES)
def test_layer_norm_with_modulation(  # the parameters are the grid
    batch: int,
    length: int,
    channels: int,
    runs: int | str,
    modulation: torch.dtype | None,
    dtype: torch.dtype,
) -> None:
    groups = length if runs == "all" else int(runs)
    inputs = {"x": numbers(batch, length, channels, dtype=dtype, seed=0)}
    for seed, name in enumerate(("scale", "shift"), start=1):
        inputs[name] = numbers(batch, groups, channels, dtype=modulation or dtype, seed=seed)
    check(ops.layer_norm, ops.layer_norm_reference, inputs, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [(), ("weight",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize(("batch", "length", "channels"), SIZES)
def test_layer_norm_with_weights(
    batch: int, length: int, channels: int, given: tuple[str, ...], dtype: torch.dtype
) -> None:
    inputs = {"x": numbers(batch, length, channels, dtype=dtype, seed=0)}
    for seed, name in enumerate(given, start=1):
        inputs[name] = numbers(channels, dtype=torch.float32, seed=seed)
    check(ops.layer_norm, ops.layer_norm_reference, inputs, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", [1, 13])
@pytest.mark.parametrize(("batch", "length", "channels"), SIZES)
def test_gated_residual(
    batch: int, length: int, channels: int, runs: int, dtype: torch.dtype
) -> None:
    inputs = {
        "residual": numbers(batch, length, channels, dtype=dtype, seed=0),
        "y": numbers(batch, length, channels, dtype=dtype, seed=1),
        "gate": numbers(batch, runs, channels, dtype=torch.float32, seed=2),
    }
    check(ops.residual_gate, ops.residual_gate_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "given",
    [("gate", "weight", "bias"), ("scale", "shift"), ("gate", "scale", "shift")],
    ids=str,
)
@pytest.mark.parametrize(("batch", "length", "channels"), SIZES)
def test_gated_residual_and_layer_norm(
    batch: int, length: int, channels: int, given: tuple[str, ...], dtype: torch.dtype
) -> None:
    inputs = {
        "residual": numbers(batch, length, channels, dtype=dtype, seed=0),
        "y": numbers(batch, length, channels, dtype=dtype, seed=1),
    }
    for seed, name in enumerate(given, start=2):
        shape = (channels,) if name in ("weight", "bias") else (batch, 13, channels)
        inputs[name] = numbers(*shape, dtype=torch.float32, seed=seed)
    check(ops.residual_gate_layer_norm, ops.residual_gate_layer_norm_reference, inputs, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across_heads", [True, False])
@pytest.mark.parametrize(("heads", "channels"), [(12, 128), (24, 128), (40, 128), (3, 64), (2, 20)])
def test_rms_norm_with_rotary_positions(
    heads: int, channels: int, across_heads: bool, dtype: torch.dtype
) -> None:
    length = 130
    angles = numbers(length, channels // 2, dtype=torch.float32, seed=5).detach()
    inputs = {
        "x_BSHK": numbers(2, length, heads, channels, dtype=dtype, seed=0),
        "weight": numbers(
            heads * channels if across_heads else channels, dtype=torch.float32, seed=1
        ),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    check(
        ops.rms_norm_rotary,
        ops.rms_norm_rotary_reference,
        inputs,
        eps=EPS,
        across_heads=across_heads,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 128, 1536, 5120, 100])
def test_rms_norm(channels: int, dtype: torch.dtype) -> None:
    inputs = {
        "x": numbers(3, 33, channels, dtype=dtype, seed=0),
        "weight": numbers(channels, dtype=dtype, seed=1),
    }
    check(ops.rms_norm, ops.rms_norm_reference, inputs, eps=EPS)


def test_full_size_rows_are_all_written() -> None:
    x = numbers(1, 32760, 5120, dtype=torch.bfloat16, seed=0)
    scale, shift = (numbers(1, 1, 5120, dtype=torch.float32, seed=seed) for seed in (1, 2))
    inputs = {"x": x, "scale": scale, "shift": shift}
    found = outcome(ops.layer_norm, inputs, {"eps": EPS})
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
    expected = torch.nn.functional.layer_norm(x.detach().float(), (5120,), eps=EPS)
    expected = expected * (1 + scale.detach()) + shift.detach()
    assert relative(found["out0"], expected) < 1e-2
