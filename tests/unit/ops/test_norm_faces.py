# SPDX-License-Identifier: Apache-2.0
"""What the norms refuse and how they say so; the modules in the place of torch's and apex's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvideo.errors import UserError
from fastvideo.ops import library, norm
from tests.gradients import relative

EPS = 1e-6


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


HALF = torch.bfloat16
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "float64": (
        lambda: norm.layer_norm(t(1, 2, 4, dtype=torch.float64), eps=EPS),
        "x is torch.float64: cast",
    ),
    "integers": (lambda: norm.rms_norm(torch.ones(2, 4, dtype=torch.int64)), "x is torch.int64"),
    "no channels": (lambda: norm.layer_norm(t(2, 0), eps=EPS), r"x has shape \(2, 0\)"),
    "a scalar": (lambda: norm.rms_norm(torch.tensor(1.0)), r"x has shape \(\)"),
    "weight": (
        lambda: norm.layer_norm(t(1, 2, 4), weight=t(5), eps=EPS),
        r"weight has shape \(5,\): give \(4,\)",
    ),
    "bias's dtype": (
        lambda: norm.layer_norm(t(1, 2, 4), bias=t(4, dtype=HALF), eps=EPS),
        "bias is torch.bfloat16: cast it to float32",
    ),
    "runs": (
        lambda: norm.layer_norm(t(1, 6, 4), scale=t(1, 4, 4), eps=EPS),
        r"scale has shape \(1, 4, 4\): give \(1, G, 4\) .* divides the 6 tokens",
    ),
    "no runs": (
        lambda: norm.layer_norm(t(1, 6, 4), shift=t(1, 0, 4), eps=EPS),
        r"shift has shape \(1, 0, 4\)",
    ),
    "samples": (
        lambda: norm.residual_gate(t(2, 6, 4), t(2, 6, 4), t(3, 1, 4)),
        r"gate has shape \(3, 1, 4\): give \(2, G, 4\)",
    ),
    "modulation without tokens": (
        lambda: norm.layer_norm(t(6, 4), scale=t(1, 1, 4), eps=EPS),
        r"x has shape \(6, 4\): give \(B, S, D\) where there is a scale",
    ),
    "modulation's dtype": (
        lambda: norm.layer_norm(t(1, 6, 4), scale=t(1, 1, 4, dtype=HALF), eps=EPS),
        "scale is torch.bfloat16",
    ),
    "y": (
        lambda: norm.residual_gate(t(1, 6, 4), t(1, 6, 4, dtype=HALF), t(1, 1, 4)),
        "y is .* torch.bfloat16 and residual .* torch.float32",
    ),
    "different runs": (
        lambda: norm.layer_norm(t(1, 6, 4), scale=t(1, 1, 4), shift=t(1, 2, 4), eps=EPS),
        "numbers of runs differ: {'scale': 1, 'shift': 2}",
    ),
    "odd channels": (
        lambda: norm.rms_norm_rotary(t(1, 3, 2, 5), None, t(3, 2), t(3, 2), EPS, False),
        "cos is .* an even number of channels",
    ),
    "angles of fewer tokens": (
        lambda: norm.rms_norm_rotary(t(1, 3, 2, 4), None, t(3, 2), t(2, 2), EPS, False),
        r"sin is \(2, 2\) torch.float32: give \(3, 2\)",
    ),
    "angles' dtype": (
        lambda: norm.rms_norm_rotary(t(1, 3, 2, 4), None, t(3, 2, dtype=HALF), t(3, 2), EPS, False),
        "cos is .* torch.bfloat16: give",
    ),
    "weight of one head": (
        lambda: norm.rms_norm_rotary(t(1, 3, 2, 4), t(4), t(3, 2), t(3, 2), EPS, True),
        r"weight has shape \(4,\): give \(8,\)",
    ),
    "heads": (
        lambda: norm.rms_norm_rotary(t(3, 2, 4), None, t(3, 2), t(3, 2), EPS, True),
        r"x has shape \(3, 2, 4\): give \(B, S, H, K\)",
    ),
    "memory_efficient": (
        lambda: norm.FusedLayerNorm(4, memory_efficient=True),
        "memory_efficient=True: .* leave it out",
    ),
    "normalized_shape": (
        lambda: norm.FusedRMSNorm(4)(t(2, 5)),
        r"the input has shape \(2, 5\), .* normalized_shape \(4,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_functions_name_the_argument_and_the_fix(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        call()


X, MEAN, HEADS = t(1, 6, 4), t(1, 6), t(1, 3, 2, 4)
NONE4 = (None,) * 4
HOSTILE: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "x's dtype": ("layer_forward", (X.double(), *NONE4, EPS), "x is float64"),
    "x's axes": ("layer_forward", (X[0], *NONE4, EPS), r"x has shape \(6, 4\), expected"),
    "no channels": ("layer_forward", (X[..., :0], *NONE4, EPS), "expected channels"),
    "eps": ("layer_forward", (X, *NONE4, -1.0), "eps is -1"),
    "eps is no number": ("rms_forward", (HEADS, None, None, None, False, torch.nan), "eps is nan"),
    "weight": ("layer_forward", (X, t(5), None, None, None, EPS), r"weight has shape \(5\)"),
    "weight's dtype": (
        "layer_forward",
        (X, t(4).double(), None, None, None, EPS),
        "weight is float64, expected float32 or the dtype of x",
    ),
    "scale's runs": (
        "layer_forward",
        (X, None, None, t(1, 4, 4), None, EPS),
        "scale has shape .* divides the 6 tokens of x",
    ),
    "no runs": ("layer_forward", (X, None, None, t(1, 0, 4), None, EPS), "scale has shape"),
    "shift's runs": (
        "layer_forward",
        (X, None, None, t(1, 2, 4), t(1, 3, 4), EPS),
        r"shift has shape \(1, 3, 4\), expected \(1, 2, 4\)",
    ),
    "grad": ("layer_backward", (X[:, :3], X, MEAN, MEAN, *NONE4), "grad has shape"),
    "grad's dtype": ("layer_backward", (X.half(), X, MEAN, MEAN, *NONE4), "grad is float16"),
    "mean": ("layer_backward", (X, X, t(1, 5), MEAN, *NONE4), "mean has shape"),
    "rstd": ("layer_backward", (X, X, MEAN, MEAN.half(), *NONE4), "rstd is float16"),
    "y": ("residual_gate_forward", (X, X[:, :5], t(1, 1, 4)), "y has shape"),
    "gate": ("residual_gate_forward", (X, X, t(2, 1, 4)), "gate has shape"),
    "gate's gradient": ("residual_gate_backward", (X, X.half(), t(1, 1, 4)), "gate|grad"),
    "y of residual": (
        "residual_layer_forward",
        (X, X.half(), None, *NONE4, EPS),
        "y is float16, expected float32",
    ),
    "grad_sum": (
        "residual_layer_backward",
        (X[..., :3], X, X, X, MEAN, MEAN, None, *NONE4),
        "grad_sum has shape",
    ),
    "cos alone": ("rms_forward", (HEADS, None, t(3, 2), None, False, EPS), "both or neither"),
    "cos": ("rms_forward", (HEADS, None, t(4, 2), t(4, 2), False, EPS), "cos has shape"),
    "odd channels": (
        "rms_forward",
        (HEADS[..., :3], None, t(3, 1), t(3, 1), False, EPS),
        "even number",
    ),
    "weight of heads": ("rms_forward", (HEADS, t(4), None, None, True, EPS), "weight has shape"),
    "rstd of heads": (
        "rms_backward",
        (HEADS, HEADS, t(1, 3, 1), None, None, None, False),
        "rstd has shape",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_operators_name_the_argument_and_its_value(case: str) -> None:
    name, arguments, message = HOSTILE[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(library.operators(), f"norm_{name}")(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "ours, theirs, shape",
    [
        (norm.FusedLayerNorm(20), nn.LayerNorm(20), (2, 3, 20)),
        (norm.FusedLayerNorm(20, 1e-3, False), nn.LayerNorm(20, 1e-3, False), (20,)),
        (norm.FusedLayerNorm((4, 5)), nn.LayerNorm((4, 5)), (2, 3, 2, 4, 5)),
        (norm.FusedRMSNorm(20, eps=None), nn.RMSNorm(20), (2, 3, 2, 20)),
        (norm.FusedRMSNorm([4, 5]), nn.RMSNorm([4, 5], eps=1e-5), (2, 4, 5)),
        (norm.FusedRMSNorm(20, 1e-3, False), nn.RMSNorm(20, 1e-3, False), (0, 20)),
    ],
)
def test_modules_are_those_of_torch(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    inputs = [torch.randn(shape).to(dtype)] * 2
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    grad = torch.randn(shape).to(dtype)
    results = [
        (*torch.autograd.grad((out := module(x)), (x, *module.parameters()), grad), out)
        for module, x in zip((ours, theirs), inputs, strict=True)
    ]
    for mine, wanted in zip(*results, strict=True):
        assert mine.dtype == wanted.dtype
        assert mine.shape == wanted.shape
        if mine.numel():
            assert relative(mine, wanted) < (1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_autocast_leaves_the_dtype_of_tokens() -> None:
    x = t(1, 3, 8, dtype=HALF)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm.FusedLayerNorm(8)(x).dtype == HALF
        assert norm.FusedRMSNorm(8)(x.float()).dtype == torch.float32
