# SPDX-License-Identifier: Apache-2.0
"""``fastvideo check`` tells what is here, and fails where a required part is missing or wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvideo import check

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastvideo", "check", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_it_tells_versions_and_kernels_and_that_they_compute() -> None:
    done = run("--require", "kernels", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["missing"] == []
    assert found["versions"]["torch"].startswith("2.")
    assert found["kernels"]["problem"] is None
    assert found["kernels"]["backends"]["vsa"]["cpu"] == found["kernels"]["cpu_isa"]
    for error in found["kernels"]["errors"]["cpu"].values():
        assert 0 < error < 1e-5


def test_a_person_reads_lines() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert "kernels" in done.stdout
    assert "self-test" in done.stdout


def test_a_missing_gpu_is_an_error_only_if_required() -> None:
    done = run("--require", "kernels,gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "gpu: torch" in done.stderr
    assert "finds no CUDA device" in done.stderr
    assert "kernels " in done.stdout  # what was found is told all the same


def test_an_unknown_part_is_named() -> None:
    done = run("--require", "kernels,tpu")
    assert done.returncode == 2
    assert "'tpu' is not one of kernels, gpu" in done.stderr


def test_an_instruction_set_that_is_unknown_or_not_to_be_had_is_named() -> None:
    done = run("--require", "kernels", FASTVIDEO_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "FASTVIDEO_CPU_ISA=sse9: use generic, avx2, avx512 or avx512_bf16" in done.stderr


def test_it_runs_where_torch_is_not_installed(tmp_path: Path) -> None:
    # A finder in front hides torch as an environment without it would.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    done = run("--require", "kernels", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "torch is not installed, which kernels need" in done.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"problem": "no library"}, "kernels: no library"),
        ({"errors": {"cpu": {"vsa": 0.1}}}, "kernels: vsa on cpu is 1.0e-01 off its reference"),
        ({"errors": {"cpu": {"vsa": "the result is not finite"}}}, "vsa on cpu: the result is not"),
        ({"errors": {"cuda:0": {"norm": "invalid device function"}}}, "norm on cuda:0: invalid"),
        ({"devices": True}, "there is a GPU, but the library has no CUDA kernels (no nvcc)"),
    ],
)
def test_each_way_kernels_can_fail_is_told(change: dict[str, Any], told: str) -> None:
    kernels = {
        "problem": None,
        "build": {"cuda": None, "why_no_cuda": "no nvcc"},
        "errors": {"cpu": {"vsa": 1e-7}},
        **change,
    }
    devices = [{"name": "GPU", "capability": "9.0"}] if change.get("devices") else []
    sentence = check.REQUIREMENTS["kernels"]({"kernels": kernels, "devices": devices})
    assert sentence is not None
    assert told in sentence


def test_a_gpu_that_is_too_old_is_named() -> None:
    devices = [{"name": "Tesla V100", "capability": "7.0"}]
    sentence = check.REQUIREMENTS["gpu"]({"devices": devices})
    assert sentence == "gpu: Tesla V100 has capability 7.0, kernels need 8.0 or newer"
