# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of kernels limited by memory: no spills, and accesses in vectors."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[3] / "csrc"
IN_VECTORS = ("norm/layer_forward", "norm/layer_backward", "norm/rms")
SOURCES = (*IN_VECTORS, "norm/sums", "vsa/pool", "vsa/index")
ARCH = "90a"


def compile_for_ptxas(source: str, folder: Path) -> tuple[str, str]:
    """Compile for one architecture; return what ptxas said and the PTX."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in PATH")
    done = subprocess.run(
        [
            *(nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"),
            *("-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{CSRC}"),
            f"-isystem={Path(torch.__file__).parent / 'include'}",
            *("-gencode", f"arch=compute_{ARCH},code=sm_{ARCH}", "-Xptxas", "-v", "-cubin"),
            *("--keep", f"--keep-dir={folder}", "-o", str(folder / "out.cubin")),
            str(CSRC / f"{source}.cu"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (ptx,) = folder.glob("*.ptx")
    return done.stderr, ptx.read_text()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_spills_and_tensors_are_accessed_in_vectors(source: str, tmp_path: Path) -> None:
    told, ptx = compile_for_ptxas(source, tmp_path)
    stacks = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told
    )
    assert stacks
    assert set(stacks) == {("0", "0", "0")}, told
    if source not in IN_VECTORS:
        return
    for kernel in re.split(r"\.entry ", ptx)[1:]:
        name = kernel.split("(")[0]
        # 16-bit tensors never one by one; float32 beside them is statistics and angles.
        assert not re.search(r"\b(ld|st)(\.\w+)*\.[bu]16\b", kernel), name
        assert re.search(r"\bst(\.\w+)*\.v4\.", kernel), name
        assert re.search(
            r"\bld(\.\w+)*\.v4\.|cp\.async\.cg\S+ \[%r\d+\], \[%rd\d+\], 16", kernel
        ), name
