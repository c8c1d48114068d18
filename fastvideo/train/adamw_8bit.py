# SPDX-License-Identifier: Apache-2.0
"""torchao's 8-bit AdamW, made to train and to resume in any layout.

Imports torchao: import this file only where that optimizer is chosen.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import disable_cache_limit
from torch.distributed.tensor import DTensor
from torchao import optim
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from fastvideo.models.weights import local_part

BLOCK = 256
"""Numbers that share a scale (Dettmers et al., 2022)."""
LEAST = 4096
"""Numbers of a matrix below which float32 stays, as in torchao and bitsandbytes."""

warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash")
_compiled_step = torch.compile(single_param_adam, fullgraph=True, dynamic=False)


class AdamW8bit(optim.AdamW8bit):  # type: ignore[misc]
    """Keeps both running means of a matrix in 8 bits and a float32 scale per block.

    Blocks never cross rows here, else float32 stays: a parameter is split over processes between
    its rows, so that states are the same numbers, and fit into each other, however many processes
    share it. torchao decides by the size of a part.

    Steps are compiled, once for each shape of a part. torchao compiles them for DTensors, whose
    parts may differ in shape; torch's cache of compiled graphs (2.13) does not look at that and
    hands one process the code of another, which then writes nothing, or beyond its part.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose learning rate stays a number, as in torch's optimizers."""
        lr = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Make a step with the gradients that are there."""
        assert closure is None
        with disable_cache_limit():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_of(parameter, group)

    def _step_of(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(parameter, True)
            state["exp_avg_sq"] = self._new_buffer(parameter, False)
        state["step"] += 1
        ours = local_part(parameter.detach())
        if ours.numel() == 0:
            return
        assert parameter.grad is not None
        _compiled_step(  # type: ignore[no-untyped-call]
            ours,
            local_part(parameter.grad),
            state["step"],
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            None,
            torch.tensor(float(group["lr"])),
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            IS_ADAMW=True,
            BF16_STOCHASTIC_ROUND=False,
        )

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        part = local_part(p.detach())
        whole_blocks = p.ndim >= 2 and math.prod(p.shape[1:]) % BLOCK == 0
        if not whole_blocks or p.numel() < LEAST or part.numel() == 0:
            return torch.zeros_like(p)
        out: Tensor = self._subclass_zeros(part, signed, BLOCK)
        if isinstance(p, DTensor):
            out = DTensor.from_local(
                out,
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
        return out.to(p.device)  # with offload that of a part is not that of its mesh


@OptimState8bit.implements([torch.ops.aten.clone.default, torch.ops.aten._to_copy.default])  # type: ignore[untyped-decorator]
def _copied(
    function: Any, types: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> OptimState8bit:
    """Copy what torchao cannot clone, or hands out again where only the device is to change."""
    state, device = arguments[0], options.get("device")
    parts = (part.to(device, copy=True) for part in (state.codes, state.scale, state.qmap))
    return OptimState8bit(*parts, state.signed, dtype=options.get("dtype", state.dtype))
