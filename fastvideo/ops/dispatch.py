# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call of `fastvideo.ops` takes on this machine."""

import os

import torch

from fastvideo.errors import UserError
from fastvideo.ops.library import KernelsMissing, build, cpu_isa

NOT_BUILT = "not built"
NO_DEVICE = "no device"


def backends() -> dict[str, dict[str, str]]:
    """Say for each family of operators and device which kernels a call takes.

    Returns:
        For ``vsa`` and ``norm``: under ``cpu`` the instruction set, or ``not built``; under
        ``cuda`` the tensor-core instruction, ``wgmma`` or ``mma`` (``norm``, which has no matrix
        products: ``cuda``), ``not built``, ``no device``, or the reason why there is none for it.

    Raises:
        UserError: FASTVIDEO_CPU_ISA or FASTVIDEO_VSA_KERNEL names what is not to be had here.
    """
    try:
        cpu, built = cpu_isa(), build()
    except KernelsMissing:
        return {family: {"cpu": NOT_BUILT, "cuda": NOT_BUILT} for family in ("vsa", "norm")}
    if built.cuda is None:
        cuda = NOT_BUILT
    elif not torch.cuda.is_available():
        cuda = NO_DEVICE
    else:
        cuda = cuda_kernels(torch.cuda.get_device_capability(), built.cuda_archs)
    norm = "cuda" if cuda in ("mma", "wgmma") else cuda
    cuda = _asked(cuda)
    return {"vsa": {"cpu": cpu, "cuda": cuda}, "norm": {"cpu": cpu, "cuda": norm}}


def _asked(cuda: str) -> str:
    """Return the kernels that FASTVIDEO_VSA_KERNEL demands of a device that takes ``cuda``."""
    asked = os.environ.get("FASTVIDEO_VSA_KERNEL") or "auto"
    if asked not in ("auto", "mma", "wgmma"):
        raise UserError(f"FASTVIDEO_VSA_KERNEL={asked}: use auto, mma or wgmma")
    if asked == "auto" or cuda not in ("mma", "wgmma"):
        return cuda
    if asked == "wgmma" != cuda:
        raise UserError(
            "FASTVIDEO_VSA_KERNEL=wgmma: this needs a GPU of capability 9.0 and a build for 9.0a"
        )
    return asked


def cuda_kernels(capability: tuple[int, int], archs: list[str]) -> str:
    """Say which kernels a device takes of those compiled for ``archs``, such as 8.0+PTX or 9.0a."""
    if capability == (9, 0) and "9.0a" in archs:
        return "wgmma"
    if any(_runs(capability, arch) for arch in archs):
        return "mma"
    device = ".".join(map(str, capability))
    return f"not built for {device}: TORCH_CUDA_ARCH_LIST was {' '.join(archs)}"


def _runs(capability: tuple[int, int], arch: str) -> bool:
    """Code runs on later minor versions, PTX on all later devices, of 9.0a on that one alone."""
    number, _, ptx = arch.partition("+")
    specific = number[-1] in "af"
    major, minor = map(int, number.rstrip("af").split("."))
    if specific:
        # "f": the whole family, the later minor versions.
        return capability == (major, minor) or (
            number[-1] == "f" and capability[0] == major and capability[1] >= minor
        )
    return (capability[0] == major and capability[1] >= minor) or (
        ptx == "PTX" and capability >= (major, minor)
    )
