# SPDX-License-Identifier: Apache-2.0
"""torchao's 8-bit AdamW, made to resume in any layout and to take learning rates as numbers.

Imports torchao: import this file only where that optimizer is chosen.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchao import optim
from torchao.optim.subclass_8bit import OptimState8bit

BLOCK = 256
"""Numbers that share a scale (Dettmers et al., 2022)."""

warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash")


class AdamW8bit(optim.AdamW8bit):  # type: ignore[misc]
    """Keeps both running means of a matrix in 8 bits and a float32 scale per block.

    Blocks never cross rows here, else float32 stays: a parameter is split over processes between
    its rows, so that states are the same numbers, and fit into each other, however many processes
    share it. torchao decides by the size of a part. Steps are compiled, once for each shape.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose learning rate stays a number, as in torch's optimizers."""
        lr = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = lr

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make a step; torchao wants the learning rate as a tensor meanwhile."""
        rates = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(float(lr))
        try:
            return super().step(closure)
        finally:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if p.ndim >= 2 and math.prod(p.shape[1:]) % BLOCK == 0:
            quantized: Tensor = super()._new_buffer(p, signed)
            return quantized
        return torch.zeros_like(p)


@OptimState8bit.implements([torch.ops.aten.clone.default, torch.ops.aten._to_copy.default])  # type: ignore[untyped-decorator]
def _copied(
    function: Any, types: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> OptimState8bit:
    """Copy what torchao cannot clone, or hands out again where only the device is to change."""
    state, device = arguments[0], options.get("device")
    parts = (part.to(device, copy=True) for part in (state.codes, state.scale, state.qmap))
    return OptimState8bit(*parts, state.signed, dtype=options.get("dtype", state.dtype))
