# SPDX-License-Identifier: Apache-2.0
"""GPUs by name, and which share of what they can compute is used."""

from fastvideo.config.devices import DEVICES, Device, find_device

__all__ = ["DEVICES", "Device", "find_device", "mfu"]


def mfu(flops: float, *, seconds: float, device: Device, processes: int, dtype: str) -> float:
    """Model FLOPs utilisation: the share of the peak of all GPUs that ``flops`` amount to.

    Args:
        flops: What all processes did together, of the model (`fastvideo.cost.flops`).
        seconds: That it took them.
        device: One GPU for each process.
        processes: How many there are.
        dtype: In which matrix products are computed.
    """
    return flops / (seconds * processes * device.tflops(dtype) * 1e12)
