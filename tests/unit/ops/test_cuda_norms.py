# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the norms, run in the emulator, against float64 and against themselves.

Axes: B batch, S tokens, D channels, G runs of tokens that share a modulation, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, BF16: 1e-2, F16: 1e-2}
EPS = 1e-6


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Shapes of one call; the names of ``given`` are the optional vectors."""

    dtype: torch.dtype
    shape: tuple[int, int, int]
    groups: int = 1
    given: tuple[str, ...] = ("weight", "bias", "scale", "shift", "gate")
    vectors: torch.dtype = F32

    def tokens(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return (1.5 * x + 0.5).to(self.dtype)

    def vector(self, name: str) -> Tensor | None:
        """(D,) or (B, G, D), part of a larger tensor as modulations are."""
        if name not in self.given:
            return None
        batch, _, dim = self.shape
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        if name in ("weight", "bias"):
            return torch.randn(dim, generator=generator, dtype=torch.float64).to(self.vectors)
        many = torch.randn(batch, self.groups, 2, dim, generator=generator, dtype=torch.float64)
        return many.to(self.vectors)[:, :, 1]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{str(self.dtype)[6:]}-{shape}-{self.groups}-{''.join(n[:2] for n in self.given)}"


CASES = [
    Case(F32, (2, 6, 64), groups=3),
    Case(F32, (1, 9, 96), given=("scale", "shift", "gate")),
    Case(F32, (1, 3, 2056), groups=3, given=("weight", "shift")),
    Case(F32, (1, 4, 100), groups=2, given=("bias", "scale", "gate")),
    Case(BF16, (1, 23, 1536), given=("scale", "shift", "gate")),
    Case(BF16, (2, 4, 1536), groups=2, given=("weight", "bias")),
    Case(BF16, (1, 4, 3072), groups=4, given=("scale", "shift", "gate")),
    Case(F16, (1, 5, 5120), vectors=F16),
    Case(BF16, (1, 3, 33), groups=3, vectors=BF16),
    Case(BF16, (1, 3, 8200), groups=3, given=("scale", "gate")),
    Case(F16, (1, 2, 6152), given=()),
]


def layer(x: Tensor, vector: dict[str, Tensor]) -> Tensor:
    """Norm, affine and modulation in float64."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
    normed = normed * vector.get("weight", torch.tensor(1.0)) + vector.get("bias", 0.0)
    out: Tensor = normed * (1 + spread(vector, "scale", x)) + spread(vector, "shift", x)
    return out


def spread(vector: dict[str, Tensor], name: str, x: Tensor, *, otherwise: float = 0.0) -> Any:
    """Modulations (B, G, D) for each token."""
    if name not in vector:
        return otherwise
    groups = vector[name]
    return groups.repeat_interleave(x.shape[1] // groups.shape[1], dim=1)


def exact(*tensors: Tensor | None) -> list[Any]:
    """Leaves in float64."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def assert_close(
    got: Tensor, want: Tensor | None, like: Tensor | None, tolerance: float | None = None
) -> None:
    """Compare what an operator returned for ``like``, nothing where that was not given."""
    if like is None or want is None:
        assert got.shape == (0,)
        return
    assert got.dtype == like.dtype and got.shape == like.shape
    error = (got.double() - want).norm() / want.norm()
    assert error <= (tolerance or TOLERANCE[got.dtype]), error


LAYER_VECTORS = ("weight", "bias", "scale", "shift")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_norm_and_its_gradients_are_those_of_float64(emulator: Any, case: Case) -> None:
    ops = emulator.ops
    x, grad = case.tokens(1), case.tokens(2)
    vectors = [case.vector(name) for name in LAYER_VECTORS]
    x64, *leaves = exact(x, *vectors)
    named = {n: v for n, v in zip(LAYER_VECTORS, leaves, strict=True) if v is not None}
    want = layer(x64, named)
    want.backward(grad.double())

    out, mean, rstd = ops.norm_layer_forward(x, *vectors, EPS)
    assert_close(out, want, x)
    torch.testing.assert_close(mean, x.double().mean(-1).float(), atol=1e-6, rtol=1e-5)
    variance = x.double().var(-1, correction=0)
    torch.testing.assert_close(rstd, (variance + EPS).rsqrt().float(), atol=0, rtol=1e-5)
    gradients = ops.norm_layer_backward(grad, x, mean, rstd, *vectors)
    for got, leaf, given in zip(gradients, (x64, *leaves), (x, *vectors), strict=True):
        assert_close(got, None if leaf is None else leaf.grad, given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_norm_of_a_residual_sum_and_its_gradients(emulator: Any, case: Case) -> None:
    ops = emulator.ops
    residual, y, grad_sum, grad = (case.tokens(seed) for seed in range(4))
    names = ("gate", *LAYER_VECTORS)
    vectors = [case.vector(name) for name in names]
    residual64, y64, *leaves = exact(residual, y, *vectors)
    named = {n: v for n, v in zip(names, leaves, strict=True) if v is not None}
    want_sum = residual64 + y64 * spread(named, "gate", y, otherwise=1.0)
    total, out, mean, rstd = ops.norm_residual_layer_forward(residual, y, *vectors, EPS)
    assert_close(total, want_sum, residual)
    rounded = want_sum + (total.double() - want_sum).detach()  # what is normalised
    want = layer(rounded, named)
    torch.autograd.backward([rounded, want], [grad_sum.double(), grad.double()])
    assert_close(out, want, residual)
    gradients = ops.norm_residual_layer_backward(grad_sum, grad, y, total, mean, rstd, *vectors)
    y_if_gated = y if "gate" in case.given else None
    givens = (residual, y_if_gated, *vectors)
    # Of wide rows the gate's gradient is made from that of the sum after rounding.
    tolerance = TOLERANCE[case.dtype] if case.shape[2] > 6144 else None
    for got, leaf, given in zip(gradients, (residual64, y64, *leaves), givens, strict=True):
        assert_close(got, None if leaf is None else leaf.grad, given, tolerance)


@pytest.mark.parametrize("case", [c for c in CASES if "gate" in c.given], ids=str)
def test_a_gated_residual_and_its_gradients(emulator: Any, case: Case) -> None:
    residual, y, grad, gate = case.tokens(1), case.tokens(2), case.tokens(3), case.vector("gate")
    y64, gate64 = exact(y, gate)
    want = residual.double() + y64 * spread({"gate": gate64}, "gate", y)
    want.backward(grad.double())
    assert_close(emulator.ops.norm_residual_gate_forward(residual, y, gate), want, residual)
    dy, dgate = emulator.ops.norm_residual_gate_backward(grad, y, gate)
    assert_close(dy, y64.grad, y)
    assert_close(dgate, gate64.grad, gate)


@dataclass(frozen=True)
class Rms:
    """Shapes of one call."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]
    across_heads: bool
    weight: torch.dtype | None = F32
    rotary: str = "dense"

    def angles(self) -> list[Tensor | None]:
        """Cosine and sine (S, D/2), by itself or every second of a larger tensor."""
        if self.rotary == "none":
            return [None, None]
        generator = torch.Generator().manual_seed(5)
        angle = torch.rand(self.shape[1], self.shape[3] // 2, generator=generator) * 6
        if self.rotary == "repeated":
            angle = angle.repeat_interleave(2, dim=1)
            return [angle.cos()[:, ::2], angle.sin()[:, 1::2]]
        return [angle.cos(), angle.sin()]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{str(self.dtype)[6:]}-{shape}-{'across' if self.across_heads else 'each'}"


RMS_CASES = [
    Rms(F32, (2, 3, 2, 64), across_heads=True),
    Rms(F32, (2, 5, 3, 64), across_heads=False),
    Rms(BF16, (1, 7, 12, 128), across_heads=True, weight=BF16),
    Rms(BF16, (1, 7, 12, 128), across_heads=False, rotary="repeated"),
    Rms(F16, (1, 2, 40, 128), across_heads=True, rotary="none"),
    Rms(F16, (1, 4, 24, 128), across_heads=False, weight=None),
    Rms(BF16, (1, 3, 4, 96), across_heads=False),
    Rms(F32, (1, 3, 2, 12), across_heads=True),
    Rms(F32, (1, 3, 3, 10), across_heads=False, rotary="repeated"),
    Rms(F32, (1, 3, 3, 10), across_heads=True, weight=None),
    Rms(BF16, (1, 2, 65, 96), across_heads=True),
    Rms(BF16, (1, 2, 52, 128), across_heads=False),
]


def rms(x: Tensor, weight: Tensor | None, angles: list[Tensor | None], across: bool) -> Tensor:
    """RMS norm and rotation in float64."""
    dims = (2, 3) if across else (3,)
    out = x * (x.square().mean(dims, keepdim=True) + EPS).rsqrt()
    if weight is not None:
        out = out * (weight.view(x.shape[2:]) if across else weight)
    cos, sin = angles
    if cos is None or sin is None:
        return out
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    even, odd = out.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


LAYOUTS = [(case, False) for case in RMS_CASES]
# Smaller shapes say what there is to say of the other layout.
LAYOUTS += [(case, True) for case in RMS_CASES if case.shape[2] * case.shape[3] <= 2048]


@pytest.mark.parametrize(("case", "heads_first"), LAYOUTS, ids=str)
def test_rms_norm_with_rotation_and_its_gradients(
    emulator: Any, case: Rms, heads_first: bool
) -> None:
    generator = torch.Generator().manual_seed(6)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, grad = random(*case.shape).to(case.dtype), random(*case.shape).to(case.dtype)
    if heads_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    channels = case.shape[2] * case.shape[3] if case.across_heads else case.shape[3]
    weight = None if case.weight is None else random(channels).to(case.weight)
    x64, weight64 = exact(x, weight)
    angles = case.angles()
    want = rms(x64, weight64, angles, case.across_heads)
    want.backward(grad.double())

    out, rstd = emulator.ops.norm_rms_forward(x, weight, *angles, case.across_heads, EPS)
    assert_close(out, want, x)
    assert out.stride() == torch.empty_like(x).stride()
    dx, dweight = emulator.ops.norm_rms_backward(grad, x, rstd, weight, *angles, case.across_heads)
    assert dx.stride() == out.stride()
    assert_close(dx, x64.grad, x)
    assert_close(dweight, None if weight64 is None else weight64.grad, weight)


def test_the_order_of_execution_changes_no_bit(
    emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(BF16, (1, 14, 2304), groups=2)
    heads = Rms(BF16, (1, 14, 3, 128), across_heads=False)
    residual, y, grad = (case.tokens(seed) for seed in range(3))
    vectors = [case.vector(name) for name in ("gate", *LAYER_VECTORS)]
    x = residual[:, :, :384].reshape(heads.shape)
    weight, angles = torch.linspace(0.5, 1.5, 128), heads.angles()

    def run(seed: str) -> list[Tensor]:
        monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", seed)
        total, out, *stats = emulator.ops.norm_residual_layer_forward(residual, y, *vectors, EPS)
        gradients = emulator.ops.norm_residual_layer_backward(
            grad, grad, y, total, *stats, *vectors
        )
        normed, rstd = emulator.ops.norm_rms_forward(x, weight, *angles, False, EPS)
        turned = emulator.ops.norm_rms_backward(normed, x, rstd, weight, *angles, False)
        return [total, out, *stats, *gradients, normed, rstd, *turned]

    for one, other in zip(run("1"), run("2"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64)], ids=str)
def test_empty_tensors_have_gradients_of_zero(emulator: Any, shape: tuple[int, int, int]) -> None:
    ops, case = emulator.ops, Case(F32, shape)
    x, vectors = case.tokens(1), [case.vector(name) for name in LAYER_VECTORS]
    out, mean, rstd = ops.norm_layer_forward(x, *vectors, EPS)
    assert out.shape == shape
    dx, *gradients = ops.norm_layer_backward(out, x, mean, rstd, *vectors)
    assert dx.shape == shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    heads = x.reshape(*shape[:2], 1, 64)
    normed, rstd = ops.norm_rms_forward(heads, vectors[0], None, None, False, EPS)
    _, dweight = ops.norm_rms_backward(normed, heads, rstd, vectors[0], None, None, False)
    assert torch.equal(dweight, torch.zeros(64))


def test_rows_without_alignment_and_expanded_gradients_are_read(emulator: Any) -> None:
    x = torch.randn(2, 5, 65, dtype=F32)[:, :, 1:]
    grad = torch.randn(1, 1, 64).expand(2, 5, 64)
    out, mean, rstd = emulator.ops.norm_layer_forward(x, None, None, None, None, EPS)
    want = emulator.ops.norm_layer_forward(x.clone(), None, None, None, None, EPS)[0]
    assert torch.equal(out, want)
    dx = emulator.ops.norm_layer_backward(grad, x, mean, rstd, None, None, None, None)[0]
    again = emulator.ops.norm_layer_backward(
        grad.contiguous(), x.clone(), mean, rstd, None, None, None, None
    )[0]
    assert torch.equal(dx, again)


def test_rows_that_are_too_wide_are_refused(emulator: Any) -> None:
    x = torch.zeros(1, 1, 16392)
    with pytest.raises(RuntimeError, match=r"16392 channels, expected at most 16384"):
        emulator.ops.norm_layer_forward(x, None, None, None, None, EPS)
