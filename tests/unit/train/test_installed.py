# SPDX-License-Identifier: Apache-2.0
"""Compilers that an optimizer needs, as torch and triton look for them."""

from pathlib import Path

import pytest

from fastvideo.config.train import AdamW
from fastvideo.errors import UserError
from fastvideo.train.installed import check_optimizer

EIGHT_BIT = AdamW(kind="adamw_8bit")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def install(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)


def test_offloaded_states_need_a_compiler_for_the_host(programs: Path) -> None:
    install(programs, "gcc")
    check_optimizer(EIGHT_BIT, device="cuda")
    for device in ("cuda", "auto", "cpu"):
        with pytest.raises(UserError, match=r"a C\+\+ compiler"):
            check_optimizer(EIGHT_BIT, device=device, offload=True)
    install(programs, "g++")
    for device in ("cuda", "auto", "cpu"):
        check_optimizer(EIGHT_BIT, device=device, offload=True)


def test_what_stays_whole_on_the_gpu_needs_one_for_it(programs: Path) -> None:
    install(programs, "g++")
    with pytest.raises(UserError, match="compiler"):
        check_optimizer(EIGHT_BIT, device="cuda", offload=True)


def test_a_compiler_with_a_wrapper_is_none_for_torch(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.13 runs all of CXX as the name of one program, and finds none."""
    install(programs, "ccache", "g++")
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(UserError, match=r"CXX='ccache g\+\+' is taken for the name of one program"):
        check_optimizer(EIGHT_BIT, device="cpu")
    monkeypatch.setenv("CXX", str(programs / "g++"))
    check_optimizer(EIGHT_BIT, device="cpu")
