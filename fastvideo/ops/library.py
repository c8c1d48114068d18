# SPDX-License-Identifier: Apache-2.0
"""Loads fastvideo/_C.so and says what it holds; operators never fall back on anything silently."""

import ctypes
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvideo.errors import UserError

PATH = Path(__file__).parents[1] / "_C.so"
NAMESPACE = "fastvideo"

Register = Callable[[str], None]
"""Registers shapes (fake kernels) and gradients of a file's operators in a namespace."""

_registrations: list[Register] = []
_loaded: list[str] = []
_active: Any = None


class KernelsMissing(UserError):
    """There is no library of kernels, or this torch cannot load it."""


@dataclass(frozen=True)
class Build:
    """How the library was built."""

    torch: str
    oldest_torch: str
    cpu: list[str]
    """Instruction sets that CPU kernels were compiled for."""
    cuda: str | None
    """Version of the CUDA toolkit; None if CUDA kernels were left out."""
    cuda_archs: list[str]
    why_no_cuda: str | None


def register(registration: Register) -> Register:
    """Have ``registration`` called for every namespace, now or when it is loaded."""
    _registrations.append(registration)
    for namespace in _loaded:
        registration(namespace)
    return registration


def operators() -> Any:
    """Return the namespace of operators; loads the library at first.

    Raises:
        KernelsMissing: It was not built, or cannot be loaded.
    """
    if _active is None:
        _activate(PATH, NAMESPACE)
    return _active


def load_if_built() -> None:
    """Load now what is there, so that torch.compile never meets the loading of a library."""
    if _active is None and PATH.is_file():
        _activate(PATH, NAMESPACE)


def _activate(path: Path, namespace: str) -> None:
    global _active
    _load(path)
    if namespace not in _loaded:
        _loaded.append(namespace)
        for registration in _registrations:
            registration(namespace)
    _active = getattr(torch.ops, namespace)


def empty_rows_like(x: torch.Tensor) -> torch.Tensor:
    """Return what kernels allocate for results: the layout of ``x`` if that has dense rows.

    Otherwise, as for inputs that overlap in memory, it is contiguous. The same as in csrc/tensor.h.
    """
    like = torch.empty_like(x)
    dense = x.shape[-1] <= 1 or like.stride(-1) == 1
    return like if dense else x.new_empty(x.shape)


@contextmanager
def emulator(path: Path) -> Iterator[None]:
    """Let every operator be the CUDA kernel that g++ compiled for the CPU, in tests.

    Args:
        path: What ``python setup.py build_emulator`` made.
    """
    global _active
    before = _active
    _activate(path, "fastvideo_emulator")
    try:
        yield
    finally:
        _active = before


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise KernelsMissing(
            f"{path} is not there: this installation was built with FASTVIDEO_BUILD=none; "
            "pip install torch, then pip install fastvideo-hpc again without it"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise KernelsMissing(f"torch {torch.__version__} cannot load {path}: {error}") from error
    return ctypes.CDLL(str(path))


@functools.cache
def build() -> Build:
    """Say how the library was built.

    Raises:
        KernelsMissing: It was not built, or cannot be loaded.
    """
    tell = _load(PATH).fastvideo_build
    tell.restype = ctypes.c_char_p
    return Build(**json.loads(tell()))


@functools.cache
def cpu_isa() -> str:
    """Return the instruction set of CPU kernels: the best here, or FASTVIDEO_CPU_ISA.

    Raises:
        KernelsMissing: There is no library.
        UserError: FASTVIDEO_CPU_ISA names what this processor does not have.
    """
    tell = _load(PATH).fastvideo_cpu_isa
    tell.restype = ctypes.c_char_p
    answer: str = tell().decode()
    if answer.startswith("error: "):
        raise UserError(answer.removeprefix("error: "))
    return answer
