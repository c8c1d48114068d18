# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ into fastvideo/_C.so, one library of CPU and CUDA kernels for any Python and torch.

FASTVIDEO_BUILD        auto (CUDA kernels where nvcc is found), cpu, cuda (nvcc is a must), none
TORCH_CUDA_ARCH_LIST   default 8.0+PTX;9.0a;10.0a
MAX_JOBS               compilers at a time, default one per core

The library uses LibTorch's stable ABI only, so torch is not imported here: its headers and files
are found, nothing more. Nothing asks for a GPU. ``python setup.py build_emulator`` makes the
library of the tests, in which g++ compiles the CUDA sources against csrc/emulator.
"""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
MODES = ("auto", "cpu", "cuda", "none")
# sm_80 code runs on every 8.x; its PTX is compiled by the driver for what comes after 10.x.
DEFAULT_ARCHS = "8.0+PTX;9.0a;10.0a"
OLDEST_TORCH = (2, 11)
WITH_SM90 = "-DFASTVIDEO_SM90"  # the kernels for 9.0a alone are part of the build
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"

WARNINGS = ["-Wall", "-Wextra", "-Werror=return-type", "-Wno-unknown-pragmas"]
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS, "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
NVCC_FLAGS += ["-Xptxas", "-v"]  # registers and spills; what compilers say is kept beside objects
# Chosen when the program runs (csrc/cpu/isa.cpp), so never -march=native.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 takes the unset operand of its own intrinsics for a mistake (GCC bug 105593).
AVX512 = [
    *AVX2,
    "-Wno-maybe-uninitialized",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
]
X86_ISAS = {"generic": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
SANITIZERS = ["-O1", "-g1", "-fsanitize=address"]
ISAS = X86_ISAS if platform.machine() == "x86_64" else {"generic": []}


def fail(reason: str) -> None:
    """End the build with one message."""
    sys.exit(f"fastvideo: {reason}")


def build_mode() -> str:
    """Return what FASTVIDEO_BUILD asks for."""
    mode = os.environ.get("FASTVIDEO_BUILD", "auto")
    if mode not in MODES:
        fail(f"FASTVIDEO_BUILD={mode}: use {', '.join(MODES)}")
    return mode


def find_torch() -> Path:
    """Return the folder of torch: of this environment, or of the one pip builds for."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    # pip hides the environment's packages from an isolated build, yet we want its torch.
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            check_torch(folder)
            return folder
    fail(
        "torch is needed to build the kernels, and this environment has none: install torch "
        f"{version_text(OLDEST_TORCH)} or newer first (pip install torch), or set "
        "FASTVIDEO_BUILD=none for a host that only submits jobs and needs no kernels"
    )
    raise AssertionError


def check_torch(folder: Path) -> None:
    """Refuse a torch older than the stable ABI we use."""
    version = torch_version(folder)
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        fail(
            f"torch {version} in {folder} is too old: the kernels need "
            f"{version_text(OLDEST_TORCH)} or newer"
        )


def torch_version(folder: Path) -> str:
    """Read the version of torch in ``folder`` without importing it."""
    text = (folder / "version.py").read_text()
    found = re.search(r"__version__ = '([^']+)'", text)
    return found[1] if found else "unknown"


def version_text(version: tuple[int, int]) -> str:
    """(2, 11) as 2.11."""
    return ".".join(map(str, version))


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and what to build with it."""

    nvcc: Path
    version: str
    archs: list[str]

    @property
    def libraries(self) -> Path:
        """The folder of libcudart_static.a."""
        # nvcc may be a script that calls the real one, which alone knows where it lives.
        told = subprocess.run([self.nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        top = re.search(r"TOP=(\S+)", told.stderr)
        home = Path(top[1]) if top else self.nvcc.resolve().parent.parent
        for folder in (home / "lib64", home / "targets" / "x86_64-linux" / "lib", home / "lib"):
            if (folder / "libcudart_static.a").is_file():
                return folder
        fail(f"no libcudart_static.a beside {self.nvcc}")
        raise AssertionError

    def gencode(self, *, only: str = "") -> list[str]:
        """The flags for the architectures, or for the one called ``only`` if it is among them."""
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            if only and number != only:
                continue
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if arch.endswith("+PTX"):
                flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        return flags


def find_cuda(mode: str) -> tuple[Cuda | None, str]:
    """Return the toolkit to build with, or None and why not."""
    if mode == "cpu":
        return None, "FASTVIDEO_BUILD=cpu"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        reason = f"nvcc was not found in {f'CUDA_HOME={home}' if home else 'PATH'}"
        if mode == "cuda":
            fail(f"FASTVIDEO_BUILD=cuda, but {reason}")
        return None, reason
    told = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", told)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    split = [arch for arch in re.split(r"[ ;,]+", archs) if arch]
    for arch in split:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            fail(f"TORCH_CUDA_ARCH_LIST={archs}: {arch!r} is not like 8.0, 9.0a or 8.0+PTX")
        if float(re.match(r"\d+\.\d", arch)[0]) < 8:
            fail(f"TORCH_CUDA_ARCH_LIST={archs}: {arch} is older than 8.0, the oldest we support")
    return Cuda(Path(nvcc), release[1] if release else "unknown", split), ""


@dataclass
class Library:
    """Objects to compile, each only if it changed, and the library they become."""

    path: Path
    folder: Path
    commands: list[list[str]] = field(default_factory=list)

    def add(self, compiler: list[str], source: Path, *, name: str) -> None:
        """Add one object."""
        target = self.folder / f"{name}.o"
        self.commands.append([*compiler, "-c", str(source), "-o", str(target)])

    def build(self, link: list[str]) -> None:
        """Run what is not up to date, and link."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        asked = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if not asked.isdecimal() or (jobs := int(asked)) < 1:
            fail(f"MAX_JOBS={asked}: give the number of compilers at a time")
        headers = digest(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
        with ThreadPoolExecutor(jobs) as pool:
            stamps = list(pool.map(lambda command: run_once(command, headers), self.commands))
        new = self.path.with_suffix(".new")
        objects = [command[-1] for command in self.commands]
        command = [*cxx(), "-shared", *objects, "-o", str(new), *link]
        # Each place the library is built to has a stamp of its own, written when it is there.
        place = hashlib.sha256(str(self.path.absolute()).encode()).hexdigest()[:16]
        stamp = self.folder / f"linked-{place}.stamp"
        now = hashlib.sha256(json.dumps([command, stamps]).encode()).hexdigest()
        if self.path.is_file() and stamp.is_file() and stamp.read_text() == now:
            return
        stamp.unlink(missing_ok=True)
        run(command)
        new.replace(self.path)  # a process that has the old one open keeps it
        stamp.write_text(now)


def digest(paths: Iterable[Path]) -> str:
    """Return a hash of the contents of files."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.read_bytes())
    return total.hexdigest()


@functools.cache
def version_of(compiler: str) -> str:
    """Return what a compiler says of itself: another one may come to stand at the same place."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def cxx() -> list[str]:
    """Return the C++ compiler: CXX, which may be several words, or g++."""
    return shlex.split(os.environ.get("CXX") or "g++")


def run_once(command: list[str], headers: str) -> str:
    """Run a compiler unless it, command, source and headers are those of the last time.

    Returns:
        A hash of all these.
    """
    source, target = Path(command[-3]), Path(command[-1])
    stamp = target.with_suffix(".stamp")
    made_of = json.dumps([version_of(command[0]), command, headers])
    now = hashlib.sha256(made_of.encode() + source.read_bytes()).hexdigest()
    if target.is_file() and stamp.is_file() and stamp.read_text() == now:
        return now
    stamp.unlink(missing_ok=True)
    target.with_suffix(".log").write_text(run(command))
    stamp.write_text(now)
    return now


def run(command: list[str]) -> str:
    """Run a command and show it; return what it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    statistics = re.compile("ptxas info|.* bytes stack frame")
    said = "\n".join(line for line in done.stdout.splitlines() if not statistics.match(line))
    print(" ".join(command), *filter(None, [said]), sep="\n", flush=True)
    if done.returncode != 0:
        fail(f"this command failed, see its messages above:\n  {' '.join(command)}")
    return done.stdout


def torch_flags(torch: Path) -> list[str]:
    """Flags of every file that sees torch; its version, so that another one is another command."""
    return [
        f"-I{CSRC}",
        f"-DFASTVIDEO_BUILT_WITH_TORCH={torch_version(torch)}",
        "-isystem",
        str(torch / "include"),
        STABLE_ABI,
    ]


def link_flags(torch: Path) -> list[str]:
    """Flags to link against torch; on CUDA builds libtorch.so brings libtorch_cuda.so along."""
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    return [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]


def add_cpu(library: Library, torch: Path, *, info: dict[str, object]) -> None:
    """Add the C++ sources: kernels once for each instruction set, the rest once."""
    compiler = [*cxx(), *CXX_FLAGS, *torch_flags(torch)]
    told = f"-DFASTVIDEO_BUILD_INFO={json.dumps(json.dumps(info))}"
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.is_relative_to(CSRC / "emulator"):
            continue
        name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
        if not source.stem.startswith("kernels_"):
            extra = [told] if name == "bindings" else []
            library.add([*compiler, *extra], source, name=name)
            continue
        for isa, flags in ISAS.items():
            library.add([*compiler, *flags, f"-DFASTVIDEO_ISA={isa}"], source, name=f"{name}-{isa}")


def add_cuda(library: Library, torch: Path, cuda: Cuda) -> None:
    """Add the CUDA sources; those called *_sm90.cu exist for that architecture only."""
    compiler = [str(cuda.nvcc), *NVCC_FLAGS, *torch_flags(torch), "-DUSE_CUDA"]
    if cuda.gencode(only="90a"):
        compiler.append(WITH_SM90)
    for source in sorted(CSRC.rglob("*.cu")):
        gencode = cuda.gencode(only="90a" if source.stem.endswith("_sm90") else "")
        name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
        if gencode:
            library.add([*compiler, *gencode], source, name=f"{name}-cuda")


class BuildKernels(build_ext):
    """``build_ext``: fastvideo/_C.so."""

    def run(self) -> None:
        """Compile and link, or say what is left out."""
        mode = build_mode()
        if mode == "none":
            print("fastvideo: FASTVIDEO_BUILD=none: no kernels in this build", file=sys.stderr)
            return
        torch = find_torch()
        cuda, reason = find_cuda(mode)
        if cuda is None:
            print(f"fastvideo: WARNING: CUDA kernels are left out: {reason}", file=sys.stderr)
        root = Path() if self.inplace else Path(self.build_lib)
        library = Library(root / "fastvideo" / "_C.so", Path(self.build_temp) / "kernels")
        info = {
            "torch": torch_version(torch),
            "oldest_torch": version_text(OLDEST_TORCH),
            "cpu": list(ISAS),
            "cuda": cuda and cuda.version,
            "cuda_archs": cuda.archs if cuda else [],
            "why_no_cuda": reason or None,
        }
        add_cpu(library, torch, info=info)
        link = link_flags(torch)
        if cuda:
            add_cuda(library, torch, cuda)
            link += [f"-L{cuda.libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        library.build(link)

    def get_outputs(self) -> list[str]:
        """Return what an installation holds."""
        path = Path(self.build_lib) / "fastvideo" / "_C.so"
        return [str(path)] if path.is_file() else []


class BuildEmulator(Command):
    """``build_emulator``: the CUDA sources, compiled by g++ to run on the CPU, for the tests."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Compile every .cu file and csrc/emulator into build/emulator/_emulator.so."""
        torch = find_torch()
        folder = Path("build") / "emulator"
        library = Library(folder / "_emulator.so", folder / "objects")
        compiler = [*cxx(), *CXX_FLAGS, *torch_flags(torch)]
        # Registers and stacks hold huge numbers until they are written.
        compiler += ["-DFASTVIDEO_EMULATOR", "-ftrivial-auto-var-init=pattern", WITH_SM90]
        for source in sorted((*CSRC.rglob("*.cu"), *(CSRC / "emulator").rglob("*.cpp"))):
            name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
            library.add([*compiler, "-x", "c++"], source, name=name)
        library.build(link_flags(torch))


class BuildChecked(Command):
    """``build_checked``: the CPU kernels with sanitizers, for the tests.

    avx2.so is what most processors run. wide.so computes with vectors of 16 and multiplies pairs of
    bfloat16, as AVX512-BF16 does, but in instructions that every processor has.
    """

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Compile build/checked/avx2.so, where this processor is an x86, and wide.so."""
        torch = find_torch()
        wide = ["-DFASTVIDEO_WIDE", "-DFASTVIDEO_PORTABLE_PAIRS"]
        variants = {"avx2": AVX2, "wide": wide} if "avx2" in ISAS else {"wide": wide}
        compiler = [*cxx(), *CXX_FLAGS, *SANITIZERS, *torch_flags(torch)]
        # Both come as the build called generic.
        compiler += ["-DFASTVIDEO_ONE_ISA", '-DFASTVIDEO_BUILD_INFO="{}"']
        for variant, flags in variants.items():
            folder = Path("build") / "checked"
            library = Library(folder / f"{variant}.so", folder / "objects")
            for source in sorted(CSRC.rglob("*.cpp")):
                if source.is_relative_to(CSRC / "emulator"):
                    continue
                name = "-".join(source.relative_to(CSRC).with_suffix("").parts)
                if not source.stem.startswith("kernels_"):
                    library.add(compiler, source, name=name)
                    continue
                own = [*compiler, *flags, "-DFASTVIDEO_ISA=generic"]
                library.add(own, source, name=f"{name}-{variant}")
            library.build([*SANITIZERS, *link_flags(torch)])


class WheelOfAnyPython(bdist_wheel):
    """The library has no Python symbols: one wheel serves every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM, or py3-none-any without kernels."""
        platform_tag = "any" if build_mode() == "none" else super().get_tag()[2]
        return "py3", "none", platform_tag


class WithKernels(Distribution):
    """Tells setuptools that the wheel belongs to a platform, unless it holds no kernels."""

    def has_ext_modules(self) -> bool:
        """True if kernels are built."""
        return build_mode() != "none"


setup(
    ext_modules=[Extension("fastvideo._C", [])],
    distclass=WithKernels,
    cmdclass={
        "build_ext": BuildKernels,
        "build_emulator": BuildEmulator,
        "build_checked": BuildChecked,
        "bdist_wheel": WheelOfAnyPython,
    },
)
