# SPDX-License-Identifier: Apache-2.0
"""How fast a run is: samples, tokens and operations per second, and the share of the peak."""

from dataclasses import dataclass

from fastvideo.cost.devices import Device, mfu


@dataclass(frozen=True)
class Work:
    """What a step computes, and on what."""

    samples_per_step: int
    """Of all processes together."""
    tokens_per_sample: int
    """Of the video, as the transformer sees it; text does not count."""
    flops_per_sample: float
    """Of the model, forward and backward, as if attention were dense; recomputation for the sake
    of memory does not count."""
    actual_flops_per_sample: float
    """The same with attention as it is computed."""
    processes: int
    """Each with a GPU of its own, or a share of the CPU."""
    device_name: str
    """As torch or the driver calls it."""
    dtype: str
    """Of the computation."""


def rates(work: Work, *, steps: int, seconds: float, device: Device | None) -> dict[str, float]:
    """Speed over ``steps`` optimizer steps that took ``seconds``.

    Returns:
        ``samples_per_s``, ``tokens_per_s``, each also ``_per_gpu``; ``tflops_per_gpu``, 1e12 model
        operations a second. With a known ``device`` also ``mfu``, a share of its dense peak; both
        count what is computed. Where attention leaves something out, ``mfu_dense_equivalent``
        tells what dense attention would need to be as fast.
    """
    samples = work.samples_per_step * steps
    samples_per_s = samples / seconds
    by_gpu = samples_per_s / work.processes
    found = {
        "samples_per_s": samples_per_s,
        "samples_per_s_per_gpu": by_gpu,
        "tokens_per_s": samples_per_s * work.tokens_per_sample,
        "tokens_per_s_per_gpu": by_gpu * work.tokens_per_sample,
        "tflops_per_gpu": by_gpu * work.actual_flops_per_sample / 1e12,
    }
    if device is None:
        return found
    flops = {"mfu": work.actual_flops_per_sample}
    if work.actual_flops_per_sample != work.flops_per_sample:
        flops["mfu_dense_equivalent"] = work.flops_per_sample
    return found | {
        name: mfu(
            samples * value,
            seconds=seconds,
            device=device,
            processes=work.processes,
            dtype=work.dtype,
        )
        for name, value in flops.items()
    }
