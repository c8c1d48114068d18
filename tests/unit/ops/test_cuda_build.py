# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the fine attention's kernels by mma.sync: no spills, few enough registers."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[3] / "csrc"
ARCHS = ("80", "90a")
# Registers that leave room for the blocks of 128 threads we want on a multiprocessor of 65536:
# four and three in the forward, two in the backward.
BUDGET = {
    ("fine_forward", 64): 128,
    ("fine_forward", 128): 168,
    ("fine_backward", 64): 255,
    ("fine_backward", 128): 255,
}


def cuobjdump() -> str | None:
    """The disassembler: of the toolkit, or of PyPI's nvidia-cuda-cuobjdump and -nvdisasm."""
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))


@pytest.fixture(scope="module", params=[(s, a) for s in ("forward", "backward") for a in ARCHS])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, str]:
    """Name of a source, the code of it for one architecture, and what ptxas said."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in PATH")
    direction, arch = request.param
    source = f"fine_{direction}"
    code = tmp_path_factory.mktemp("cuda") / f"{source}-{arch}.cubin"
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [
            *(nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"),
            *("-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{CSRC}", f"-isystem={include}"),
            *("-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"),
            *(str(CSRC / "vsa" / f"{source}.cu"), "-o", str(code)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return source, code, done.stderr


def test_nothing_spills_and_registers_are_within_budget(compiled: tuple[str, Path, str]) -> None:
    source, _, told = compiled
    kernels = re.findall(
        r"Compiling entry function '(\S+?)Li(\d+)E.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        told,
        re.DOTALL,
    )
    # Two formats and two head dims, of one kernel or of two.
    assert len(kernels) == (4 if source == "fine_forward" else 8), told
    for name, head_dim, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} of {head_dim} channels spills"
        assert int(registers) <= BUDGET[source, int(head_dim)], (name, head_dim, registers)


def test_products_are_those_of_tensor_cores(compiled: tuple[str, Path, str]) -> None:
    program = cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: it is in nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    _, code, _ = compiled
    path = {"PATH": str(Path(program).parent)}
    listing = subprocess.run(
        [program, "-sass", str(code)], capture_output=True, text=True, check=True, env=path
    ).stdout
    functions = listing.split("Function : ")[1:]
    assert functions
    for function in functions:
        is_bf16 = "bfloat16" in function.splitlines()[0]
        assert ("HMMA.16816.F32.BF16 " if is_bf16 else "HMMA.16816.F32 ") in function
        assert "LDSM.16.MT88.4" in function  # ldmatrix, transposed
        assert "LDGSTS.E.BYPASS" in function  # cp.async of 16 bytes
