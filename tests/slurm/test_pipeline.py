# SPDX-License-Identifier: Apache-2.0
"""One command from raw clips to videos on a real Slurm, and what comes of a stage that fails."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.models.tiny import write_tiny
from tests.slurm.lab import Lab
from tests.slurm.user_view import UID
from tests.tiny_world import Pair, make_world

EXPERTS = Pair("wan2.2-a14b")


def lay_out(folder: Path) -> tuple[Path, Path]:
    """A job for both experts with a clip that nothing can read; paths of recipe and cluster."""
    model = folder / "model"
    write_tiny(model, family=EXPERTS.family)
    world = make_world(folder / "job", clips=4, model=model, pair=EXPERTS)
    (world.root / "clips/videos/9.mp4").write_bytes(b"no video")
    world.write_items([*world.items, {"path": "9.mp4", "cap": ["nothing"]}])
    cluster = folder / "cluster.yaml"
    tree = {
        "executor": "slurm",
        "partition": "main",
        "cpus_per_task": 2,
        "threads": 1,
        "time_minutes": 10,
        "preprocess": {"tasks": 2},
    }
    cluster.write_text(yaml.safe_dump(tree))
    subprocess.run(["chown", "-R", f"{UID}:{UID}", folder], check=True)
    return world.recipe, cluster


def status(lab: Lab, recipe: Path) -> dict[str, Any]:
    done = lab.run(["fastvideo", "status", recipe, "--json"])
    assert done.returncode == 0, done.stderr
    job: dict[str, Any] = json.loads(done.stdout)["jobs"][-1]
    return job


def ended(lab: Lab, recipe: Path, *, within_s: float) -> dict[str, Any]:
    """Wait until the newest job is over."""
    deadline_s = time.monotonic() + within_s
    while (job := status(lab, recipe))["state"] in ("RUNNING", "PENDING", "UNKNOWN"):
        assert time.monotonic() < deadline_s, (job, logs(recipe))
        time.sleep(1)
    return job


def logs(recipe: Path) -> str:
    paths = sorted(recipe.parent.glob("run/jobs/*/*/log*.txt"))
    return "\n".join(f"== {path}\n{path.read_text()}" for path in paths)


@pytest.mark.timeout(400)
def test_one_command_makes_videos_of_clips_and_a_failed_stage_says_how_to_go_on(
    lab: Lab, folder: Path
) -> None:
    recipe, cluster = lay_out(folder)
    command: list[str | Path] = [
        "fastvideo",
        "run",
        recipe,
        "source.max_failed=0.0",
        "--cluster",
        cluster,
    ]
    began_s = time.monotonic()
    submitted = lab.run(command)
    assert submitted.returncode == 0, submitted.stderr
    assert time.monotonic() - began_s < 15  # it does not wait for the job
    first = Path(submitted.stdout.strip())
    assert first.stat().st_mode & 0o777 == 0o700 and first.stat().st_uid == UID

    job = ended(lab, recipe, within_s=120)
    states = {name: part["state"] for name, part in job["parts"].items()}
    assert states == {
        "manifest": "COMPLETED",
        "preprocess": "FAILED",
        "train-high": "CANCELLED",
        "train-low": "CANCELLED",
        "export": "CANCELLED",
        "generate": "CANCELLED",
    }, logs(recipe)
    text = lab.run(["fastvideo", "status", recipe]).stdout
    assert "1 of 5 clips failed" in text and "source.max_failed=0" in text
    assert f"to go on: fastvideo run {recipe} source.max_failed=0.0 --cluster {cluster}" in text
    assert "DependencyNeverSatisfied" in text or "needs preprocess" in text, text

    again = lab.run(["fastvideo", "run", recipe, "source.max_failed=0.3", "--cluster", cluster])
    assert again.returncode == 0, again.stderr
    job = ended(lab, recipe, within_s=240)
    assert job["state"] == "COMPLETED", logs(recipe)
    videos = sorted(path.name for path in folder.glob("job/run/generate/export/*.mp4"))
    assert videos == ["0000.mp4", "0001.mp4"]
    marker = json.loads((folder / "job/run/export/fastvideo.json").read_text())
    assert "transformer_2" in json.dumps(marker)
    side_by_side(again.stdout.strip(), lab)
    nothing_again = [path for path in Path(again.stdout.strip()).glob("preprocess/log-*.txt")]
    assert not any("encoding" in path.read_text() for path in nothing_again)


def side_by_side(folder: str, lab: Lab) -> None:
    """Both experts trained at the same time."""
    record = json.loads((Path(folder) / "job.json").read_text())
    ids = [part["slurm_id"] for part in record["parts"] if part["verb"] == "train"]
    assert len(ids) == 2
    command = ["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "Start,End"]
    rows = [line.split("|") for line in lab.run(command).stdout.split()]
    assert max(start for start, _ in rows) < min(end for _, end in rows)
