# SPDX-License-Identifier: Apache-2.0
"""Tests of ``slurm/pipeline.sh``: five jobs, each after the one before, without any edit."""

import os
import subprocess
from pathlib import Path

from tests.stand_ins import StandIns

ROOT = Path(__file__).parents[3]
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >>{folder}/sbatch.txt
echo $((100 + $(wc -l <{folder}/sbatch.txt)))
"""


def pipeline(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """The calls of sbatch, without the folder of the scripts."""
    program = folder / "sbatch"
    program.write_text(SBATCH.format(folder=folder))
    program.chmod(0o755)
    tools = StandIns(folder)
    done = subprocess.run(
        ["bash", ROOT / "slurm/pipeline.sh", *arguments],
        env={**os.environ, "PATH": tools.path, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "the last job is 105" in done.stdout
    return [line.replace(f"{ROOT}/slurm/", "") for line in tools.asked("sbatch")]


def test_five_jobs_wait_for_each_other(tmp_path: Path) -> None:
    calls = pipeline(tmp_path, "recipe.yaml", "train.steps=2")
    recipe = "recipe.yaml train.steps=2"
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert calls == [
        f"--parsable preprocess.sbatch {recipe} --manifest-only",
        f"--parsable {after.format(101)} --array=0-7 preprocess.sbatch {recipe}",
        f"--parsable {after.format(102)} train.sbatch {recipe}",
        f"--parsable {after.format(103)} --job-name=export --export=ALL,VERB=export "
        f"generate.sbatch {recipe}",
        f"--parsable {after.format(104)} generate.sbatch {recipe}",
    ]


def test_each_kind_of_job_takes_its_own_options_after_those_of_all(tmp_path: Path) -> None:
    calls = pipeline(
        tmp_path,
        "recipe.yaml",
        TASKS="3",
        ALL="--cpus-per-task=2 --partition=main",
        GPU="--gpus-per-node=1",
        TRAIN="--nodes=2 --cpus-per-task=8",
    )
    assert all("--cpus-per-task=2 --partition=main" in call for call in calls)
    assert ["--gpus-per-node=1" in call for call in calls] == [False, True, False, False, True]
    assert "--partition=main --nodes=2 --cpus-per-task=8 train.sbatch" in calls[2]
    assert "--array=0-2" in calls[1]
