# SPDX-License-Identifier: Apache-2.0
"""Tests of fastvideo/ops/dispatch.py."""

from pathlib import Path

import pytest

from fastvideo.errors import UserError
from fastvideo.ops import backends, library
from fastvideo.ops.dispatch import _asked, cuda_kernels

ARCHS = ["8.0+PTX", "9.0a", "10.0a"]


@pytest.mark.parametrize(
    ("capability", "archs", "kernels"),
    [
        ((8, 0), ARCHS, "mma"),
        ((8, 9), ARCHS, "mma"),
        ((9, 0), ARCHS, "wgmma"),
        ((9, 0), ["9.0"], "mma"),
        ((9, 0), ["8.0"], "not built for 9.0: TORCH_CUDA_ARCH_LIST was 8.0"),
        ((10, 0), ARCHS, "mma"),
        ((10, 3), ["10.0a"], "not built for 10.3: TORCH_CUDA_ARCH_LIST was 10.0a"),
        ((10, 3), ["10.0f"], "mma"),
        ((12, 0), ARCHS, "mma"),
        ((7, 5), ARCHS, "not built for 7.5: TORCH_CUDA_ARCH_LIST was 8.0+PTX 9.0a 10.0a"),
    ],
)
def test_a_device_takes_the_kernels_compiled_for_it(
    capability: tuple[int, int], archs: list[str], kernels: str
) -> None:
    assert cuda_kernels(capability, archs) == kernels


@pytest.mark.parametrize(
    ("asked", "cuda", "taken"),
    [
        ("", "wgmma", "wgmma"),
        ("auto", "mma", "mma"),
        ("mma", "wgmma", "mma"),
        ("wgmma", "wgmma", "wgmma"),
        ("wgmma", "no device", "no device"),
    ],
)
def test_a_kernel_can_be_demanded(
    asked: str, cuda: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", asked)
    assert _asked(cuda) == taken


@pytest.mark.parametrize(
    ("asked", "reason"), [("wgmma", "capability 9.0"), ("triton", "use auto, mma or wgmma")]
)
def test_a_kernel_that_is_not_to_be_had_is_refused(
    asked: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", asked)
    with pytest.raises(UserError, match=f"FASTVIDEO_VSA_KERNEL={asked}: .*{reason}"):
        _asked("mma")


def test_a_cpu_says_its_instruction_set() -> None:
    for family in ("vsa", "norm"):
        assert backends()[family]["cpu"] == library.cpu_isa()


def test_no_library_is_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "_C.so")
    monkeypatch.setattr("fastvideo.ops.dispatch.cpu_isa", library.cpu_isa.__wrapped__)
    nothing = {"cpu": "not built", "cuda": "not built"}
    assert backends() == {"vsa": nothing, "norm": nothing}
