# SPDX-License-Identifier: Apache-2.0
"""Fused norms against float64 references: outputs and gradients, layouts, threads, compilers."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvideo.ops import library, norm, norm_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
EPS = 1e-6
BATCH = 2

Norm = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """A function of `norm`, its reference, and the tensors both take."""

    fused: Norm
    reference: Norm
    inputs: dict[str, Tensor]
    """float64."""
    vectors: tuple[str, ...] = ("weight", "bias", "scale", "shift", "gate")
    """Inputs that may stay in float32."""
    constants: tuple[str, ...] = ()
    """Inputs in float32 that have no gradient."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def modulations(names: str, groups: int, dim: int) -> dict[str, Tensor]:
    return {name: draw(BATCH, groups, dim) for name in names.split()}


def layer_subject(given: str, tokens: int, groups: int, dim: int) -> Subject:
    affine = {name: draw(dim) for name in given.split() if name in ("weight", "bias")}
    others = " ".join(name for name in given.split() if name not in affine)
    return Subject(
        lambda **a: norm.layer_norm(a.pop("x"), **a, eps=EPS),
        lambda **a: norm_reference.layer_norm_reference(a.pop("x"), **a, eps=EPS),
        {"x": draw(BATCH, tokens, dim) + 1, **affine, **modulations(others, groups, dim)},
    )


def residual_subject(given: str, tokens: int, groups: int, dim: int) -> Subject:
    inputs = layer_subject(given, tokens, groups, dim).inputs
    inputs = {"residual": inputs.pop("x"), "y": draw(BATCH, tokens, dim), **inputs}
    return Subject(
        lambda **a: norm.residual_gate_layer_norm(**a, eps=EPS),
        lambda **a: norm_reference.residual_gate_layer_norm_reference(**a, eps=EPS),
        inputs,
    )


def gate_subject(tokens: int, groups: int, dim: int) -> Subject:
    shape = (BATCH, tokens, dim)
    inputs = {"residual": draw(*shape), "y": draw(*shape), **modulations("gate", groups, dim)}
    return Subject(norm.residual_gate, norm_reference.residual_gate_reference, inputs)


def rms_subject(weight: bool, tokens: int, dim: int) -> Subject:
    inputs = {"x": draw(BATCH, tokens, dim), **({"weight": draw(dim)} if weight else {})}
    return Subject(norm.rms_norm, norm_reference.rms_norm_reference, inputs)


def rotary_subject(across_heads: bool, tokens: int, heads: int, dim: int) -> Subject:
    angles = draw(tokens, dim // 2).float()
    inputs = {
        "x_BSHK": draw(BATCH, tokens, heads, dim),
        "weight": draw(heads * dim if across_heads else dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }
    return Subject(
        lambda **a: norm.rms_norm_rotary(**a, eps=EPS, across_heads=across_heads),
        lambda **a: norm_reference.rms_norm_rotary_reference(
            **a, eps=EPS, across_heads=across_heads
        ),
        inputs,
        constants=("cos", "sin"),
    )


def poison(size: int) -> None:
    """Let memory that is handed out next hold NaN."""
    blocks = [torch.full((size,), torch.nan) for size in (size, size, size // 2, size // 2)]
    del blocks


def draw_gradients(subject: Subject, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """One for each output; all have the shape of the tokens."""
    is_pair = "residual" in inputs and subject.fused is not norm.residual_gate
    shape = next(iter(inputs.values())).shape
    return [torch.randn(shape).to(dtype) for _ in range(2 if is_pair else 1)]


def run(function: Norm, inputs: dict[str, Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of what can have one."""
    outputs = function(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
    poison(max(leaf.numel() for leaf in leaves))
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def prepare(subject: Subject, dtype: torch.dtype, narrow: bool) -> dict[str, Tensor]:
    """Round the inputs to what the kernels take."""
    return {
        name: tensor
        if name in subject.constants
        else tensor.to(torch.float32 if name in subject.vectors and not narrow else dtype)
        .detach()
        .requires_grad_()
        for name, tensor in subject.inputs.items()
    }


def check(subject: Subject, dtype: torch.dtype, *, narrow: bool = False) -> None:
    """Compare outputs and all gradients; ``narrow``: vectors have the dtype of the tokens."""
    inputs = prepare(subject, dtype, narrow)
    exact = {
        name: tensor if name in subject.constants else tensor.detach().double().requires_grad_()
        for name, tensor in inputs.items()
    }
    grads = draw_gradients(subject, inputs, dtype)
    poison(grads[0].numel())
    ours = run(subject.fused, inputs, grads)
    theirs = run(subject.reference, exact, [grad.double() for grad in grads])
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error <= TOLERANCES[dtype], (error, mine.shape)
    for mine, leaf in zip(ours[len(grads) :], inputs.values(), strict=False):
        assert mine.dtype == leaf.dtype


SHAPES = [
    (1, 1, 64),
    (7, 7, 100),
    (7, 1, 1536),
    (130, 1, 96),
    (130, 10, 1536),
    (130, 130, 100),
    (600, 3, 20),
    (5, 5, 1),
]
"""Tokens, runs, channels: whole vectors and parts of one, pieces of a run and many runs a task."""
OPTIONS = ("", "weight", "bias", "weight bias", "scale shift", "shift", "weight bias scale shift")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_their_references(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    tokens, _, dim = shape
    if dim == 1:  # a norm of one channel is 0: only that nothing breaks
        assert norm.layer_norm(draw(BATCH, tokens, 1).to(dtype), eps=EPS).abs().max() == 0
        return
    for given in OPTIONS:
        check(layer_subject(given, *shape), dtype)
        check(residual_subject(given, *shape), dtype)
    check(layer_subject("weight bias scale shift", *shape), dtype, narrow=True)
    check(residual_subject("gate", *shape), dtype)
    check(residual_subject("gate weight bias", *shape), dtype)
    check(residual_subject("gate scale shift", *shape), dtype, narrow=True)
    check(residual_subject("gate weight bias scale shift", *shape), dtype)
    check(gate_subject(*shape), dtype)
    check(gate_subject(*shape), dtype, narrow=True)
    check(rms_subject(True, tokens, dim), dtype)
    check(rms_subject(False, tokens, dim), dtype, narrow=True)
    for across_heads in (False, True):
        check(rotary_subject(across_heads, tokens, 3, dim if dim < 1536 else 128), dtype)
        check(rotary_subject(across_heads, tokens, 2, 64), dtype, narrow=True)


def test_results_larger_than_caches_are_those_of_their_parts() -> None:
    """What is written past the caches, row by row; of these every second one is aligned for it."""
    torch.manual_seed(0)
    x, y, grad = torch.randn(3, 1, 8200, 1100)
    assert x.numel() * 4 > 32 << 20
    vectors = torch.randn(3, 1, 1, 1100)
    cos, sin = torch.randn(2, 8200, 110)

    def results(part: slice) -> list[Tensor]:
        tokens, added, g = (t[:, part].detach() for t in (x, y, grad))
        tokens.requires_grad_(), added.requires_grad_()
        total, normed = norm.residual_gate_layer_norm(tokens, added, vectors[0], eps=EPS)
        plain = norm.layer_norm(tokens, scale=vectors[1], shift=vectors[2], eps=EPS)
        gated = norm.residual_gate(tokens, added, vectors[0])
        heads = tokens.unflatten(2, (5, 220))
        turned = norm.rms_norm_rotary(heads, None, cos[part], sin[part], EPS, True)
        outputs = [normed, plain, gated, turned.flatten(2)]
        grads = [torch.autograd.grad(out, (tokens, added), g, allow_unused=True) for out in outputs]
        return [total, *outputs, *(grad for pair in grads for grad in pair if grad is not None)]

    parts = [results(slice(0, 4000)), results(slice(4000, None))]
    for whole, *pieces in zip(results(slice(None)), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces, dim=1))


def test_kernels_of_every_instruction_set_equal_their_references() -> None:
    built = library.build().cpu
    for isa in built[: built.index(library.cpu_isa())]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        told = subprocess.run(
            [*command, "-k", "test_kernels_equal_their_references and (130 or 600)"],
            env={**os.environ, "FASTVIDEO_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, f"{isa}:\n{told.stdout}"


@pytest.mark.parametrize(
    "subject",
    [
        layer_subject("weight bias scale shift", 4, 2, 6),
        residual_subject("gate weight bias scale shift", 4, 2, 6),
        residual_subject("", 4, 2, 6),
        gate_subject(4, 2, 6),
        rms_subject(True, 4, 6),
        rotary_subject(True, 4, 2, 6),
        rotary_subject(False, 4, 2, 6),
    ],
)
def test_references_are_differentiated_correctly(subject: Subject) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in subject.inputs.values()]
    names = list(subject.inputs)
    torch.autograd.gradcheck(
        lambda *tensors: subject.reference(**dict(zip(names, tensors, strict=True))), inputs
    )


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator: strided tokens, what may be left out both given and not."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 20)[:, ::2]
    rows = torch.randn(2, 20, 6).transpose(1, 2)
    y, weight, bias = torch.randn(2, 6, 20), torch.randn(20), torch.randn(20)
    scale, shift, gate = torch.randn(2, 3, 3, 20).unbind(1)
    heads = torch.randn(2, 3, 6, 8).transpose(1, 2)
    cos, sin = torch.randn(2, 6, 8)[:, :, ::2]
    mean, rstd = torch.rand(2, 2, 6)
    return {
        "layer_forward": (x, weight, None, scale, shift, EPS),
        "layer_forward of columns": (rows, None, None, None, None, EPS),
        "layer_backward": (y, x, mean, rstd, weight, bias, scale, None),
        "residual_gate_forward": (x, y, gate),
        "residual_gate_backward": (x, y, gate),
        "residual_layer_forward": (x, y, gate, weight, bias, scale, shift, EPS),
        "residual_layer_forward without gate": (rows, y, None, weight, bias, None, None, EPS),
        "residual_layer_backward": (x, rows, y, x, mean, rstd, gate, None, bias, None, shift),
        "residual_layer_backward without gate": (x, y, x, y, mean, rstd, *[None] * 5),
        "rms_forward": (heads, torch.randn(24), cos, sin, True, EPS),
        "rms_forward of heads": (heads, None, None, None, False, EPS),
        "rms_backward": (heads, heads, torch.rand(2, 6, 3), torch.randn(8), cos, sin, False),
        "rms_backward across heads": (
            *(heads, heads, torch.rand(2, 6, 1), torch.randn(24).bfloat16().float()),
            *(None, None, True),
        ),
    }


@pytest.mark.parametrize("call", operator_calls())
def test_operators_keep_what_their_schemas_promise(call: str) -> None:
    name = call.split()[0]
    operator = getattr(library.operators(), f"norm_{name}")
    arguments = operator_calls()[call]
    if name.endswith("forward"):
        arguments = tuple(
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.shape != (6, 4) else a
            for a in arguments
        )
    torch.library.opcheck(operator.default, arguments)


def test_results_have_the_layout_of_their_tokens() -> None:
    heads_first = torch.randn(2, 3, 7, 16).transpose(1, 2)
    assert norm.rms_norm(heads_first).stride() == heads_first.stride()
    tokens_first = torch.randn(7, 2, 16).transpose(0, 1)
    assert norm.layer_norm(tokens_first, eps=EPS).stride() == tokens_first.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[..., 8:40],
        lambda x: x.transpose(1, 2),
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.transpose(0, 1),
        lambda x: x[0].unfold(0, 4, 1).transpose(1, 2)[..., :3],
    ],
)
def test_rows_may_lie_anywhere(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = view(torch.randn(2, 30, 48, dtype=dtype))
    y = view(torch.randn(2, 30, 48, dtype=dtype))
    copy = x.contiguous()
    scale = torch.randn(6, x.shape[0], 1, x.shape[2]).transpose(0, 2)[0, :, :1]
    for ours, wanted in (
        (norm.layer_norm(x, scale=scale, eps=EPS), norm.layer_norm(copy, scale=scale, eps=EPS)),
        (norm.residual_gate(x, y, scale), norm.residual_gate(copy, y.contiguous(), scale)),
        (norm.rms_norm(x), norm.rms_norm(copy)),
    ):
        assert torch.equal(ours, wanted)


def test_angles_may_come_as_diffusers_gives_them() -> None:
    torch.manual_seed(0)
    x, weight, angles = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(5, 4)
    plain = norm.rms_norm_rotary(x, weight, angles.cos(), angles.sin(), EPS, False)
    twice = angles.repeat_interleave(2, dim=1)
    for table in (twice, twice[None, :, None]):
        ours = norm.rms_norm_rotary(x, weight, table.cos(), table.sin(), EPS, False)
        assert torch.equal(ours, plain)


def test_modulations_may_have_frames_or_serve_a_batch() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(2, 6, 8), torch.randn(1, 3, 8, requires_grad=True)
    plain = norm_reference.layer_norm_reference(x, scale=scale.expand(2, 3, 8), eps=EPS)
    ours = norm.layer_norm(x, scale=scale.unsqueeze(2), eps=EPS)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), scale),
        torch.autograd.grad(plain.square().sum(), scale),
    )


@pytest.mark.parametrize(
    "subject",
    [
        residual_subject("gate weight bias scale shift", 300, 3, 96),
        residual_subject("gate weight bias scale shift", 300, 300, 96),
        gate_subject(300, 1, 96),
        rotary_subject(True, 300, 2, 64),
        rotary_subject(False, 300, 2, 64),
    ],
)
def test_the_number_of_threads_changes_no_bit(subject: Subject) -> None:
    inputs = prepare(subject, torch.float32, False)
    grads = draw_gradients(subject, inputs, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(run(subject.fused, inputs, grads))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_compilers_see_one_graph() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(2, 3, 1, 16)]
    cos, sin = torch.randn(2, 1, 6, 1, 8)

    def block(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        total, normed = norm.residual_gate_layer_norm(x, y, scale, shift=scale, eps=EPS)
        turned = norm.rms_norm_rotary(normed.unflatten(2, (2, 8)), None, cos, sin, EPS, True)
        return norm.residual_gate(total, norm.layer_norm(turned.flatten(2), eps=EPS), scale)

    compiled = torch.compile(block, fullgraph=True)
    results = []
    for function in (block, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("batch, tokens", [(0, 4), (2, 0)])
def test_no_tokens_give_gradients_of_zero(batch: int, tokens: int) -> None:
    x = torch.randn(batch, tokens, 20, requires_grad=True)
    vectors = [torch.randn(20, requires_grad=True), torch.randn(20, requires_grad=True)]
    scale = torch.randn(batch, 1, 20, requires_grad=True)
    poison(20)
    out = norm.layer_norm(x, weight=vectors[0], bias=vectors[1], scale=scale, eps=EPS)
    assert out.shape == x.shape
    for grad in torch.autograd.grad(out.sum(), (*vectors, scale)):
        assert (grad == 0).all()
    heads = norm.rms_norm(x, vectors[0])
    assert (torch.autograd.grad(heads.sum(), vectors[0])[0] == 0).all()


def test_a_broken_row_breaks_no_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 20)
    x[0, 3, 5] = torch.nan
    x[0, 5, 2] = torch.inf
    for out in (norm.layer_norm(x, eps=EPS), norm.rms_norm(x)):
        assert out[0].isfinite().all(1).tolist() == [i not in (3, 5) for i in range(9)]


def test_a_large_mean_costs_no_accuracy() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 1536) + 1000
    wanted = norm_reference.layer_norm_reference(x.double(), eps=EPS)
    assert (norm.layer_norm(x, eps=EPS) - wanted).norm() / wanted.norm() < 1e-4


def test_gradients_are_not_differentiated_again() -> None:
    x = torch.randn(1, 4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(norm.rms_norm(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
