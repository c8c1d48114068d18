# SPDX-License-Identifier: Apache-2.0
"""Tests of the house rules that no linter knows."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "peft", "pyarrow", "datasets", "av", "numpy"}
# Below fastvideo/, from docs/design.md; the linter refuses names that do not exist yet.
TORCH_FREE = (
    "config",
    "state",
    "cost",
    "launch",
    "pipeline",
    "status",
    "plan",
    "log",
    "errors",
    "hashing",
    "atomic",
)
LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"
CATCH_ALL = re.compile(r"(utils?|common|helpers?|misc|base_\w*|\w*_v\d+|\w*_new)")
PRIVATE_PATH = re.compile(rb"(?<![\w.])/(home|work|root|Users)/\w")


@pytest.mark.parametrize("verb", [[], ["lora"], ["lora", "merge"]])
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fastvideo", *verb, "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "usage: fastvideo" in done.stdout
    assert "fastvideo.cli" in imported
    assert {name.partition(".")[0] for name in imported} & HEAVY == set()


def test_the_linter_guards_every_torch_free_module() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    contracts = tools["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["type"] == "forbidden"]
    package = ROOT / "fastvideo"
    written = {
        f"fastvideo.{name}"
        for name in TORCH_FREE
        if (package / f"{name}.py").exists() or (package / name).is_dir()
    }
    assert set(contract["source_modules"]) == written
    assert set(contract["forbidden_modules"]) == HEAVY


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_python_files_open_with_the_licence_and_a_docstring() -> None:
    texts = {path: path.read_text() for path in files("*.py")}
    assert [path for path, text in texts.items() if not text.startswith(LICENCE)] == []
    assert [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))] == []


def test_no_file_has_a_catch_all_name() -> None:
    assert [path for path in files() if any(map(CATCH_ALL.fullmatch, stems(path)))] == []


def test_no_file_names_a_private_path() -> None:
    assert [path for path in files() if PRIVATE_PATH.search(path.read_bytes())] == []


def files(*patterns: str) -> list[Path]:
    """Tracked files and those that git would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = (ROOT / name for name in names.split("\0") if name)
    return [path for path in paths if path.is_file()]


def stems(path: Path) -> list[str]:
    return [Path(part).stem for part in path.relative_to(ROOT).parts]
