# SPDX-License-Identifier: Apache-2.0
"""How long training takes, estimated from the work and the peak of the device."""

from collections.abc import Mapping
from typing import Any

from fastvideo.config.devices import Device
from fastvideo.config.recipe import Recipe
from fastvideo.cost.flops import hardware_flops

EFFICIENCY = 0.35
"""Assumed share of the device's dense peak, of what it computes, recomputation included.

Published for full finetuning of Wan2.1 14B: 18 to 33 % of an H100's peak on 8 to 128 GPUs (NVIDIA
DFM's performance summary, 176 to 326 TFLOP/s with 37,440 tokens), which is 24 to 44 % if blocks
were computed again there. Data, checkpoints and held-out losses are not part of it.
"""


def step_s(recipe: Recipe, config: Mapping[str, Any], *, processes: int, device: Device) -> float:
    """Seconds of an optimizer step at `EFFICIENCY`, all processes at work."""
    work = hardware_flops(recipe, config).actual * recipe.train.global_batch_size
    return work / (processes * device.tflops(recipe.train.dtype) * 1e12 * EFFICIENCY)
