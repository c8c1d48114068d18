# SPDX-License-Identifier: Apache-2.0
"""Builds the emulator, in which the CUDA kernels run on the CPU, once for all tests that use it."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


class Emulator:
    """The library that ``python setup.py build_emulator`` makes: operators and counters."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(path)
        self.path = path
        self.ops = torch.ops.fastvideo_emulator
        self.library = ctypes.CDLL(str(path))

    def reset_counters(self) -> None:
        """Count from zero."""
        self.library.fastvideo_emulator_reset_counters()

    def count(self, name: str) -> int:
        """Return what was executed.

        One of launches, blocks, tensor_core_flops, async_bytes and largest_shared_bytes.
        """
        function = getattr(self.library, f"fastvideo_emulator_{name}")
        function.restype = ctypes.c_uint64
        return int(function())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The first of them builds the library, which on a busy machine takes minutes.
    for item in items:
        if "emulator_library" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def emulator_library() -> Emulator:
    command = [sys.executable, "setup.py", "build_emulator"]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return Emulator(ROOT / "build" / "emulator" / "_emulator.so")


@pytest.fixture
def emulator(emulator_library: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulator with the default kernels and order of execution."""
    monkeypatch.delenv("FASTVIDEO_EMULATOR_SEED", raising=False)
    monkeypatch.delenv("FASTVIDEO_VSA_KERNEL", raising=False)
    emulator_library.reset_counters()
    yield emulator_library
