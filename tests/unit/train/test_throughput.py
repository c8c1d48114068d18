# SPDX-License-Identifier: Apache-2.0
"""Rates and utilisation, by hand."""

from dataclasses import replace

import pytest

from fastvideo.cost.devices import Device, find_device
from fastvideo.train.stopwatch import Stopwatch
from fastvideo.train.throughput import Work, rates

# 64 samples a step on 8 GPUs; 100 TFLOP a sample.
WORK = Work(
    samples_per_step=64,
    tokens_per_sample=1000,
    flops_per_sample=100e12,
    actual_flops_per_sample=100e12,
    processes=8,
    device_name="Test GPU",
    dtype="bfloat16",
)
TABLE = (
    Device(
        name="TEST",
        memory_gib=80.0,
        bf16_tflops=200.0,
        float32_tflops=50.0,
        reported=("Test GPU",),
        source="made up",
    ),
)


def test_rates_are_what_a_pocket_calculator_says() -> None:
    found = rates(WORK, steps=10, seconds=160.0, device=find_device(WORK.device_name, TABLE))
    # 640 samples in 160 s are 4 a second, 0.5 on each GPU, 50 TFLOP/s of 200.
    assert found == {
        "samples_per_s": 4.0,
        "samples_per_s_per_gpu": 0.5,
        "tokens_per_s": 4000.0,
        "tokens_per_s_per_gpu": 500.0,
        "tflops_per_gpu": 50.0,
        "mfu": pytest.approx(0.25),
    }


def test_the_peak_is_that_of_the_computations_dtype() -> None:
    float32 = replace(WORK, dtype="float32")
    assert rates(float32, steps=10, seconds=160.0, device=TABLE[0])["mfu"] == pytest.approx(1.0)


def test_what_sparse_attention_leaves_out_is_not_counted() -> None:
    sparse = replace(WORK, actual_flops_per_sample=40e12)
    found = rates(sparse, steps=10, seconds=160.0, device=TABLE[0])
    assert found["tflops_per_gpu"] == pytest.approx(20.0)
    assert found["mfu"] == pytest.approx(0.1)
    assert found["mfu_dense_equivalent"] == pytest.approx(0.25)


def test_an_unknown_device_has_no_utilisation() -> None:
    unknown = find_device("Test GPU MIG 1g.10gb", TABLE)
    assert unknown is None
    found = rates(WORK, steps=10, seconds=160.0, device=unknown)
    assert "mfu" not in found and found["samples_per_s"] == 4.0


def test_a_measured_time_gives_the_utilisation() -> None:
    times_s = iter([10.0, 10.5, 11.0, 14.5])
    watch = Stopwatch("cpu", lambda: next(times_s))
    with watch.phase("forward"):
        pass
    with watch.phase("backward"):
        pass
    seconds = sum(watch.take().values())
    assert seconds == 4.0
    # 64 x 100 TFLOP in 4 s on 8 x 200 TFLOP/s.
    found = rates(WORK, steps=1, seconds=seconds, device=TABLE[0])
    assert found["mfu"] == pytest.approx(1.0)
