# SPDX-License-Identifier: Apache-2.0
"""What a real sbatch makes of hostile strings: it reads them as they are, and runs none of them."""

import subprocess
from pathlib import Path

from fastvideo.config.cluster import Cluster
from fastvideo.errors import UserError
from fastvideo.launch.job import Array, JobSpec
from fastvideo.launch.render import render
from tests.hostile_strings import HOSTILE
from tests.slurm.lab import Lab
from tests.slurm.machine import wait
from tests.slurm.user_view import UID

PROGRAM = 'printf "%s\\0" "$PWD" "$VALUE" "$SLURM_JOB_NAME" "$FASTVIDEO_JOB_DIR" "$@" >"$0"'


def spec_of(text: str, folder: Path) -> JobSpec:
    """A job that has ``text`` wherever a string can be, and writes down what it sees of it."""
    named = folder / text.replace("/", "_")
    cluster = Cluster(
        executor="slurm",
        partition="main",
        cpus_per_task=1,
        cache_dir=f"/tmp/{text.replace('%', '')}",
        environment={"VALUE": text},
        options={"comment": text},
    )
    return JobSpec(
        name="train",
        command=(PROGRAM, str(folder / "seen"), text),
        resources=cluster.resources("train"),
        cluster=cluster,
        folder=named / "job",
        work_dir=named,
        label=text,
        program=("bash", "-c"),
        array=Array("--shards", {0: text}),
    )


def test_hostile_strings_reach_a_job_as_they_are(lab: Lab, folder: Path) -> None:
    expected: dict[Path, list[str]] = {}
    for number, text in enumerate(HOSTILE):
        place = folder / str(number)
        spec = spec_of(text, place)
        spec.folder.mkdir(parents=True)
        try:
            script = render(spec).script
        except UserError:
            assert "\\" in text  # which Slurm takes in no path
            continue
        (place / "job.sbatch").write_text(script)
        expected[place] = [str(spec.work_dir), text, text, str(spec.folder), text, "--shards", text]
    subprocess.run(["chown", "-R", f"{UID}:{UID}", folder], check=True)
    assert len(expected) >= 30
    for place in expected:
        done = lab.run(["sbatch", "--parsable", place / "job.sbatch"])
        assert done.returncode == 0, (place, done.stderr)
    wait(
        lambda: all((place / "seen").exists() for place in expected),
        "all jobs",
        timeout_s=90,
    )
    for place, wanted in expected.items():
        assert (place / "seen").read_bytes().decode().split("\0")[:-1] == wanted
    assert not list(folder.rglob("injected"))
