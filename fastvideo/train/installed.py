# SPDX-License-Identifier: Apache-2.0
"""Whether what a recipe asks for is installed, found out without importing it."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from fastvideo.config.train import AdamW, Train
from fastvideo.errors import UserError

_APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)


def check_optimizer(spec: AdamW, *, device: str, offload: bool = False) -> None:
    """Refuse an optimizer that cannot run here.

    Args:
        spec: The recipe's ``train.optimizer``.
        device: ``cpu``, ``cuda`` or, where it is not known yet, ``auto``.
        offload: The recipe's ``parallel.cpu_offload``: then the optimizer steps on the host.

    Raises:
        UserError: A package or a compiler is missing, or the device does not fit.
    """
    if spec.kind == "adamw_8bit":
        _check_torchao(device, offload=offload)
    if spec.kind == "apex_adamw":
        _check_apex(device)


def check_trackers(train: Train) -> None:
    """Refuse to report to what is not installed.

    Raises:
        UserError: wandb is missing.
    """
    if train.wandb is not None and find_spec("wandb") is None:
        raise UserError(
            "train.wandb: wandb is not installed; pip install 'fastvideo-hpc[wandb]', or remove it"
        )


def _check_torchao(device: str, *, offload: bool) -> None:
    asked = "train.optimizer.kind=adamw_8bit"
    if find_spec("torchao") is None:
        raise UserError(
            f"{asked}: torchao is not installed; pip install 'fastvideo-hpc[low-bit]', or use adamw"
        )
    if not _has_compilers(device, offload=offload) or not _has_python_headers():
        raise UserError(
            f"{asked}: torch compiles it, which needs a C++ compiler and Python's headers; "
            f"apt-get install g++ python3-dev{_misread()}, or use adamw"
        )


def _check_apex(device: str) -> None:
    asked = "train.optimizer.kind=apex_adamw"
    if device == "cpu":
        raise UserError(f"{asked}: runs on CUDA GPUs only and train.device is cpu; use adamw")
    # PyPI's apex is something else; amp_C is what NVIDIA's builds for FusedAdam.
    if find_spec("apex") is None or find_spec("amp_C") is None:
        raise UserError(
            f"{asked}: NVIDIA apex with its CUDA extensions is not installed; {_APEX}, or use adamw"
        )


def _has_compilers(device: str, *, offload: bool) -> bool:
    """Whether there is what torch looks for: a C++ one for the CPU, triton a C one for GPUs.

    With offload steps are compiled for the CPU; what stays whole steps on the GPU all the same.
    Neither splits CXX and CC into words.
    """
    for_cpu = [os.environ.get("CXX", "g++")]
    for_gpu = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    needed = [{"cpu": for_cpu, "cuda": for_gpu}.get(device, for_cpu + for_gpu)]
    if offload:
        needed.append(for_cpu)
    return all(any(shutil.which(name) for name in names) for names in needed)


def _misread() -> str:
    """A hint to variables that torch and triton take for the name of one program."""
    commands = {name: os.environ.get(name, "") for name in ("CC", "CXX")}
    return "".join(
        f"; {name}={command!r} is taken for the name of one program, without arguments: name the "
        "compiler alone"
        for name, command in commands.items()
        if " " in command
    )


def _has_python_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").exists()
