# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of every CUDA kernel: no spills, registers in budget, the instructions we meant.

It reads what the build left beside its objects, for every architecture that was built.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Registers that leave room for the blocks we want on a multiprocessor, which has 65536: of the
# blocks of 128 threads with 64 and 128 channels four and three forward, two backward; of wgmma's
# one, whose warps then share them out by setmaxnreg.
MMA = {("fine_forward", 64): 128, ("fine_forward", 128): 168, ("fine_backward", 64): 255}
MMA[("fine_backward", 128)] = 255
WGMMA = {"vsa-fine_forward_sm90": 65536 // 512 // 8 * 8, "vsa-fine_backward_sm90": 168}


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of a kernel."""

    source: str
    name: str
    arch: str
    spilled: int
    """Bytes of stack and spills."""
    registers: int


@pytest.fixture(scope="module")
def objects() -> Path:
    """The folder of the objects, up to date with the sources."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not in PATH")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    (folder,) = (ROOT / "build").glob(f"temp.*{sysconfig.get_python_version().replace('.', '')}*")
    return folder / "kernels"


@pytest.fixture(scope="module")
def kernels(objects: Path) -> list[Kernel]:
    report = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = []
    for log in sorted(objects.glob("*-cuda.log")):
        source = log.stem.removesuffix("-cuda")
        for name, arch, *spilled, registers in report.findall(log.read_text()):
            total = sum(map(int, spilled))
            found.append(Kernel(source, name, arch, total, int(registers)))
    return found


pytestmark = pytest.mark.timeout(900)  # the first of them may build the library


def test_every_source_has_kernels_for_both_kinds_of_tensor_cores(kernels: list[Kernel]) -> None:
    sources = {path.stem for path in (ROOT / "csrc").rglob("*.cu")} - {"ops_cuda"}
    assert {kernel.source.partition("-")[2] for kernel in kernels} == sources
    assert {"sm_80", "sm_90a"} <= {kernel.arch for kernel in kernels}


def test_nothing_spills(kernels: list[Kernel]) -> None:
    # For 10.0a, which nobody has timed yet, a few kernels keep one to four registers elsewhere.
    allowed = {"sm_100a": 40}
    assert [kernel for kernel in kernels if kernel.spilled > allowed.get(kernel.arch, 0)] == []


@pytest.mark.parametrize(("direction", "channels"), MMA)
def test_registers_of_mma_leave_room_for_blocks(
    kernels: list[Kernel], direction: str, channels: int
) -> None:
    mine = [
        kernel
        for kernel in kernels
        if kernel.source == f"vsa-{direction}" and f"Li{channels}E" in kernel.name
    ]
    assert len(mine) >= 2  # two formats
    assert [kernel for kernel in mine if kernel.registers > MMA[direction, channels]] == []


@pytest.mark.parametrize("source", WGMMA)
def test_wgmma_kernels_have_the_registers_they_share_out(
    kernels: list[Kernel], objects: Path, source: str
) -> None:
    mine = [kernel for kernel in kernels if kernel.source == source]
    assert {kernel.arch for kernel in mine} == {"sm_90a"}
    assert {kernel.registers for kernel in mine} == {WGMMA[source]}
    # C75..: ptxas lets products wait for each other, or ignores setmaxnreg.
    assert "(C75" not in (objects / f"{source}-cuda.log").read_text()


def instructions(objects: Path, source: str, arch: str) -> dict[str, str]:
    """Disassemble the kernels of a source."""
    installed = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    path = f"{installed}:{os.environ['PATH']}"
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump and -nvdisasm")
    listing = subprocess.run(
        [tool, "-sass", "-arch", arch, objects / f"{source}-cuda.o"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", listing, re.DOTALL))
    assert found
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", ["vsa-fine_forward", "vsa-fine_backward"])
def test_products_run_on_tensor_cores(objects: Path, source: str, arch: str) -> None:
    for name, code in instructions(objects, source, arch).items():
        assert ("HMMA.16816.F32.BF16 " if "bfloat16" in name else "HMMA.16816.F32 ") in code
        assert "LDSM.16.MT88.4" in code  # ldmatrix, transposed
        assert "LDGSTS.E.BYPASS" in code  # cp.async of 16 bytes


@pytest.mark.parametrize("source", WGMMA)
def test_products_of_warpgroups_run_on_what_bulk_copies_bring(objects: Path, source: str) -> None:
    for name, code in instructions(objects, source, "sm_90a").items():
        assert code.count("HGMMA") >= 26, name
        assert code.count("UTMALDG") >= 4, name
        assert code.count("USETMAXREG") == 2, name
        assert not re.search(r"\b(LDL|STL)\b", code), name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", ["norm-layer_forward", "norm-layer_backward", "norm-rms"])
def test_norms_read_and_write_16_bytes_at_a_time(objects: Path, source: str, arch: str) -> None:
    for name, code in instructions(objects, source, arch).items():
        # 16-bit tensors never one by one; float32 beside them is statistics and angles.
        assert not re.search(r"\b(LDG|STG)(\.\w+)*\.U?16\b", code), name
        assert re.search(r"\bSTG(\.\w+)*\.128\b", code), name
        assert re.search(r"\b(LDG|LDGSTS)(\.\w+)*\.128\b", code), name
