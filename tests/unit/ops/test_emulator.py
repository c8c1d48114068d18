# SPDX-License-Identifier: Apache-2.0
"""The emulator finds the mistakes in CUDA kernels that it is there to find."""

import ctypes
import re

import pytest
import torch
from torch import Tensor

from tests.unit.ops.conftest import Emulator

SEEDS = ("0", "1", "2")


def probe(emulator: Emulator, name: str, out: Tensor | None = None) -> str | None:
    """Run a small kernel of csrc/emulator/probes.cpp; returns its error."""
    function = emulator.library.fastvideo_emulator_probe
    function.restype = ctypes.c_char_p
    out = torch.empty(128) if out is None else out
    message = function(name.encode(), ctypes.c_void_p(out.data_ptr()))
    return message.decode() if message else None


def product(emulator: Emulator, a: Tensor, b: Tensor, *, wait: bool) -> Tensor:
    """Multiply 16x16 by 16x8 by way of cp.async, ldmatrix and mma."""
    c = torch.empty(16, 8)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c)]
    function = emulator.library.fastvideo_emulator_product
    function.restype = ctypes.c_char_p
    assert function(*pointers, int(a.dtype == torch.bfloat16), int(wait)) is None
    return c


def neighbours() -> Tensor:
    """What the probe of that name writes: sums of warps, each told by the next one."""
    sums = torch.arange(128.0).view(4, 32).sum(1) + 16
    return sums.roll(-1).repeat_interleave(32)


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_shuffles_and_votes_work(
    emulator: Emulator, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", seed)
    out = torch.empty(128)
    assert probe(emulator, "neighbours", out) is None
    assert torch.equal(out, neighbours())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_shows_as_a_wrong_result(
    emulator: Emulator, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", seed)
    out = torch.empty(128)
    assert probe(emulator, "missing barrier", out) is None
    assert out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_matrices_is_exact(emulator: Emulator, dtype: torch.dtype) -> None:
    a, b = torch.randint(-8, 8, (16, 16)).to(dtype), torch.randint(-8, 8, (16, 8)).to(dtype)
    assert torch.equal(product(emulator, a, b, wait=True), a.float() @ b.float())
    assert emulator.count("tensor_core_flops") == 2 * 16 * 16 * 8
    assert emulator.count("async_bytes") == 2 * 16 * 16 + 2 * 16 * 8


def test_a_copy_that_is_not_waited_for_is_not_there(emulator: Emulator) -> None:
    a, b = torch.ones(16, 16, dtype=torch.float16), torch.ones(16, 8, dtype=torch.float16)
    assert product(emulator, a, b, wait=False).isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thread ended", "deadlock .* 127 threads wait in barrier 0 .* 1 have ended"),
        ("mask", "the mask does not hold the calling lane"),
        ("write past shared", "wrote outside of its 512 bytes of shared memory"),
        ("copy past shared", r"thread \(31, 0, 0\): cp.async: shared memory from byte 512 on"),
        ("misaligned", "load: address is not a multiple of 16"),
        ("barriers disagree", "barrier 1 of (64|128) threads, while others wait there"),
        ("too much shared", "launch refused: 232449 bytes of shared memory"),
    ],
)
def test_a_mistake_is_an_error_that_says_where(emulator: Emulator, name: str, message: str) -> None:
    found = probe(emulator, name)
    assert found is not None
    assert re.search(message, found), found
    # Nothing of it is left for the next kernel.
    assert probe(emulator, "neighbours") is None
