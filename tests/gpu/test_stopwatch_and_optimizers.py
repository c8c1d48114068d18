# SPDX-License-Identifier: Apache-2.0
"""Times on the GPU, optimizers of fewer bits there, and its part of a trace."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastvideo.config.train import AdamW, Profile
from fastvideo.train.optimizer import build_optimizer, clip_grad_norm
from fastvideo.train.profile import Profiler
from fastvideo.train.stopwatch import Stopwatch

CYCLES = 200_000_000  # about a tenth of a second


def busy_s() -> float:
    """How long the GPU takes for ``CYCLES``."""
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    torch.cuda._sleep(CYCLES)
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def test_phases_take_the_gpus_time_and_none_of_the_hosts() -> None:
    busy_s()
    expected_s = busy_s()
    watch = Stopwatch("cuda")
    start_s = time.perf_counter()
    for _ in range(2):
        with watch.phase("forward"):
            torch.cuda._sleep(CYCLES)
        with watch.phase("backward"):
            torch.cuda._sleep(2 * CYCLES)
    told_s = time.perf_counter() - start_s
    with watch.phase("data"):
        time.sleep(0.01)
    taken = watch.take()
    assert told_s < expected_s  # of six
    assert taken["forward"] == pytest.approx(2 * expected_s, rel=0.1)
    assert taken["backward"] == pytest.approx(4 * expected_s, rel=0.1)
    assert 0.01 <= taken["data"] < 0.5 * expected_s
    assert watch.take() == {}


def test_events_that_the_gpu_has_passed_are_counted_on_the_way() -> None:
    watch = Stopwatch("cuda")
    numbers = torch.ones(1024, device="cuda")
    for step in range(5000):
        with watch.phase("optimizer"):
            numbers.mul_(1.0)
        if step % 100 == 0:
            torch.cuda.synchronize()
    assert len(watch._pending) < 1000
    assert 0 < watch.take()["optimizer"] < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_train_as_well(dtype: torch.dtype) -> None:
    def losses(spec: AdamW) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).cuda()
        optimizer = build_optimizer(model, spec)
        found = []
        for step in range(40):
            generator = torch.Generator("cuda").manual_seed(step % 4)
            x = torch.randn(32, 256, generator=generator, device="cuda")
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                loss = (model(x) - x).square().mean()
            loss.backward()
            clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses(AdamW(lr=1e-3))
    assert expected[-1] < 0.8 * expected[0]
    assert losses(AdamW(kind="adamw_8bit", lr=1e-3))[-1] == pytest.approx(expected[-1], rel=0.05)


def test_a_trace_holds_what_the_gpu_did(tmp_path: Path) -> None:
    with Profiler(Profile(first_step=3, steps=1), tmp_path, rank=0) as profiler:
        for _ in range(5):
            torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
            torch.cuda.synchronize()
            profiler.step()
    trace = json.loads(gzip.decompress((tmp_path / "rank-0-step-3.json.gz").read_bytes()))
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
