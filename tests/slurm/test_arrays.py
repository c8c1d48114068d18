# SPDX-License-Identifier: Apache-2.0
"""Preprocessing as an array on a real Slurm: a dead node, a cancelled task and a damaged clip."""

import json
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo import state
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.media import flipped
from tests.slurm.lab import Lab
from tests.slurm.machine import wait
from tests.slurm.user_view import UID
from tests.tiny_world import World, in_fork, make_world

SHARDS = 16
DAMAGED = 5
"""Number of the clip that decoding fails on, and of its shard."""
CLUSTER = {
    "executor": "slurm",
    "partition": "main",
    "cpus_per_task": 4,  # a node at a time
    "threads": 1,
    "time_minutes": 10,
    "preprocess": {"parallelism": 4},
}


@dataclass(frozen=True)
class Filling:
    """A planned data set whose shards jobs fill, of the user on the login node."""

    lab: Lab
    world: World
    cluster: Path

    @property
    def store(self) -> ShardStore:
        return ShardStore(self.world.shards)

    def submit(self, *options: str) -> "subprocess.CompletedProcess[str]":
        """``fastvideo preprocess --cluster``."""
        words: list[str | Path] = [
            "fastvideo",
            "preprocess",
            self.world.recipe,
            "--cluster",
            self.cluster,
        ]
        return self.lab.run([*words, *options])

    def submitted(self) -> Path:
        """The folder of a job just submitted."""
        done = self.submit()
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def part(self) -> dict[str, Any]:
        """How far the array of the newest job is, as ``status`` tells it."""
        done = self.lab.run(["fastvideo", "status", self.world.recipe, "--json"])
        assert done.returncode == 0, done.stderr
        part: dict[str, Any] = json.loads(done.stdout)["jobs"][-1]["parts"]["preprocess"]
        return part

    def running(self) -> dict[int, str]:
        """Which node each running task is on."""
        text = self.lab.operator(["squeue", "-h", "-r", "-t", "running", "-o", "%K %N"])
        return {int(task): node for task, node in map(str.split, text.splitlines())}

    def fresh(self) -> dict[int, str]:
        """Running tasks that came after others were done, and have not committed anything."""
        done = self.committed()
        return {t: n for t, n in self.running().items() if done and t >= 4 and t not in done}

    def committed(self) -> dict[int, tuple[int, int]]:
        """Inode and time of each complete shard."""
        plan = self.store.read_plan()
        assert plan is not None
        missing = set(state.missing_shards(self.store, plan))
        stats = {i: self.store.shard(i).stat() for i in range(SHARDS) if i not in missing}
        return {index: (stat.st_ino, stat.st_mtime_ns) for index, stat in stats.items()}

    def logs(self, job: Path) -> dict[int, str]:
        """What each task said."""
        files = job.glob("preprocess/log-*.txt")
        return {int(re.sub(r"\D", "", file.name)): file.read_text() for file in files}


@pytest.fixture
def filling(lab: Lab, folder: Path) -> Filling:
    """Sixteen clips in a shard each, one of them damaged."""
    model = folder / "model"
    write_tiny(model)
    world = make_world(folder / "job", clips=SHARDS, model=model)
    flipped(world.root / f"clips/videos/{DAMAGED}.mp4")
    tree = yaml.safe_load(world.recipe.read_text())
    tree["shards"]["rows"] = 1
    world.recipe.write_text(yaml.safe_dump(tree))
    cluster = folder / "cluster.yaml"
    cluster.write_text(yaml.safe_dump(CLUSTER))
    assert in_fork(lambda: preprocess(world.load(), manifest_only=True)) == 0
    subprocess.run(["chown", "-R", f"{UID}:{UID}", folder], check=True)
    return Filling(lab, world, cluster)


@pytest.mark.timeout(400)
def test_an_array_loses_a_node_a_task_and_a_clip_and_one_more_submission_completes_it(
    filling: Filling,
) -> None:
    first = filling.submitted()
    record = json.loads((first / "job.json").read_text())
    (part,) = record["parts"]
    assert part["tasks"] == list(range(SHARDS))
    assert "#SBATCH --array=0-15%4\n" in (first / "preprocess.sbatch").read_text()

    wait(lambda: len(filling.fresh()) >= 2, "two tasks after the first", timeout_s=120)
    (lost, node), (cancelled, _) = sorted(filling.fresh().items())[-2:]
    filling.lab.kill_node(node)
    done = filling.lab.run(["scancel", f"{part['slurm_id']}_{cancelled}"])
    assert done.returncode == 0, done.stderr
    twice = filling.submit()
    assert twice.returncode == 2 and first.name in twice.stderr

    over = wait_for_end(filling, within_s=240)
    assert over["state"] == "CANCELLED"
    assert over["tasks"] == {"COMPLETED": SHARDS - 1, "CANCELLED": 1}, filling.logs(first)
    assert f"CANCELLED by {UID}" in over["why"][str(cancelled)] or over["why"][str(cancelled)]
    text = filling.lab.run(["fastvideo", "status", filling.world.recipe]).stdout
    assert f"task {cancelled}" in text
    assert f"to go on: fastvideo preprocess {filling.world.recipe}" in text
    assert "queued again" in text  # the lost node's task
    before = filling.committed()
    assert sorted(before) == [index for index in range(SHARDS) if index != cancelled]
    logs = filling.logs(first)
    assert logs[lost].count("encoding 1 clips into 1 shards") >= 1

    second = filling.submitted()
    (part,) = json.loads((second / "job.json").read_text())["parts"]
    assert part["tasks"] == [cancelled]
    over = wait_for_end(filling, within_s=60)
    assert over["state"] == "COMPLETED", filling.logs(second)
    after = filling.committed()
    assert sorted(after) == list(range(SHARDS))
    assert {index: after[index] for index in before} == before
    assert accounted(filling) == {"encoded": SHARDS - 1, "failed": 1}
    filling.lab.start_node(node)


def wait_for_end(filling: Filling, *, within_s: float) -> dict[str, Any]:
    """How the array of the newest job ended."""
    ends = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "LOST"}
    wait(lambda: filling.part()["tasks"].keys() <= ends, "the array's end", timeout_s=within_s)
    return filling.part()


def accounted(filling: Filling) -> dict[str, int]:
    """What became of the clips; the damaged one is told with its reason."""
    plan = filling.store.read_plan()
    assert plan is not None
    rows = list(state.ledger(filling.store, plan))
    (failed,) = [row for row in rows if row.state == "failed"]
    assert (failed.id, failed.reason, failed.shard) == (f"{DAMAGED}.mp4", "corrupt", DAMAGED)
    return dict(Counter(row.state for row in rows))
