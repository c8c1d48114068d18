# SPDX-License-Identifier: Apache-2.0
"""Building the library of kernels: what each FASTVIDEO_BUILD gives, and what is refused."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = "/usr/bin:/bin"  # no nvcc


def setup(*arguments: str, python: str = sys.executable, **environment: str) -> tuple[int, str]:
    """Run setup.py at the root; exit code and everything it printed."""
    done = subprocess.run(
        [python, "setup.py", *arguments],
        cwd=ROOT,
        env={**without_toolkit(), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def without_toolkit() -> dict[str, str]:
    """The environment, where nvcc is in PATH or nowhere."""
    return {name: value for name, value in os.environ.items() if name[:5] != "CUDA_"}


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """A Python with setuptools and without torch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib"))
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        (found,) = (tmp_path / "bare").glob("lib/python3*/site-packages")
        if (packages / name).is_dir():
            shutil.copytree(packages / name, found / name)
    return str(python)


def build_into(folder: Path, **environment: str) -> tuple[int, str, Path]:
    """Make a wheel of the sources as they are, with the objects that are already compiled."""
    code, told = setup(
        "build",
        f"--build-lib={folder / 'lib'}",
        "bdist_wheel",
        f"--dist-dir={folder}",
        f"--bdist-dir={folder / 'bdist'}",
        **environment,
    )
    wheels = [*folder.glob("*.whl")]
    return code, told, wheels[0] if wheels else folder


def test_without_torch_it_ends_with_the_reason_and_the_way_out(bare_python: str) -> None:
    code, told = setup("build_ext", "--inplace", python=bare_python, FASTVIDEO_BUILD="auto")
    assert code == 1
    assert "torch is needed to build the kernels" in told
    assert "pip install torch" in told
    assert "FASTVIDEO_BUILD=none" in told


def test_a_torch_that_is_too_old_is_named(bare_python: str, tmp_path: Path) -> None:
    (packages,) = (tmp_path / "bare").glob("lib/python3*/site-packages")
    headers = packages / "torch" / "include" / "torch" / "csrc" / "stable"
    headers.mkdir(parents=True)
    (headers / "library.h").touch()
    (packages / "torch" / "__init__.py").touch()
    (packages / "torch" / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    code, told = setup("build_ext", "--inplace", python=bare_python, FASTVIDEO_BUILD="cpu")
    assert code == 1
    assert "torch 2.9.1+cu128" in told
    assert "2.11 or newer" in told


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FASTVIDEO_BUILD": "gpu"}, "FASTVIDEO_BUILD=gpu: use auto, cpu, cuda, none"),
        ({"FASTVIDEO_BUILD": "cpu", "MAX_JOBS": "0"}, "MAX_JOBS=0: give the number"),
        (
            {"FASTVIDEO_BUILD": "cuda", "CUDA_HOME": "/nowhere"},
            "FASTVIDEO_BUILD=cuda, but nvcc was not found in CUDA_HOME=/nowhere",
        ),
        (
            {"FASTVIDEO_BUILD": "cuda", "PATH": COMPILERS},
            "FASTVIDEO_BUILD=cuda, but nvcc was not found in PATH",
        ),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], reason: str) -> None:
    code, told = setup("build_ext", "--inplace", **environment)
    assert code == 1
    assert reason in told


@pytest.mark.parametrize("archs", ["sm_90", "7.5", "9.0x"])
def test_architectures_that_are_none_or_too_old_are_named(archs: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    code, told = setup("build_ext", "--inplace", TORCH_CUDA_ARCH_LIST=archs)
    assert code == 1
    assert f"TORCH_CUDA_ARCH_LIST={archs}" in told


def test_a_wheel_without_kernels_is_for_any_platform(tmp_path: Path) -> None:
    code, told, wheel = build_into(tmp_path, FASTVIDEO_BUILD="none")
    assert code == 0, told
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    text = imported(wheel, tmp_path, "from fastvideo.ops import library; library.operators()")
    assert "KernelsMissing" in text
    assert "FASTVIDEO_BUILD=none" in text


def test_a_wheel_without_nvcc_has_cpu_kernels_for_any_python_and_says_so(tmp_path: Path) -> None:
    code, told, wheel = build_into(tmp_path, FASTVIDEO_BUILD="auto", PATH=COMPILERS)
    assert code == 0, told
    assert "WARNING: CUDA kernels are left out: nvcc was not found" in told
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    text = imported(
        wheel,
        tmp_path,
        "from fastvideo.ops import library; library.operators(); print(library.build())",
    )
    assert "cuda=None" in text
    assert "nvcc was not found" in text
    symbols = subprocess.run(
        ["nm", "--dynamic", tmp_path / "unpacked" / "fastvideo" / "_C.so"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert " Py" not in symbols  # one library for every Python


def imported(wheel: Path, folder: Path, code: str) -> str:
    """Unpack the wheel and run ``code`` there in a fresh process."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "unpacked",
        env={**os.environ, "PYTHONPATH": str(folder / "unpacked")},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr
