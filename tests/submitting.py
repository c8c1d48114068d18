# SPDX-License-Identifier: Apache-2.0
"""A recipe and cluster files to submit, on a machine whose Slurm is a few stand-in programs."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastvideo.launch.folder import PartFolder
from tests.slurm_tools import Tools
from tests.stand_ins import StandIns
from tests.tiny_world import Done, World, fastvideo

MAX_ARRAY = "MaxArraySize            = 1001\n"


@dataclass(frozen=True)
class Site:
    """Files of a user, and what Slurm says."""

    root: Path
    tools: Tools
    """What sacct, squeue and scontrol say."""
    stand_ins: StandIns
    """What sbatch and scancel were told."""

    @property
    def world(self) -> World:
        """The job, for `tests.tiny_world.fastvideo`."""
        return World(self.root, self.root / "recipe.yaml")

    def cluster(self, name: str = "cluster", **keys: Any) -> Path:
        """Write a cluster file, of Slurm if nothing else is said."""
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"executor": "slurm", "submitter": "sbatch", **keys}))
        return path

    def jobs(self) -> list[Path]:
        """Folders of jobs, in the order of their making."""
        return sorted((self.root / "run/jobs").glob("*"), key=lambda path: path.stat().st_ctime_ns)

    def cli(self, verb: str, *arguments: str | Path) -> Done:
        """Run ``fastvideo VERB RECIPE ...``."""
        return fastvideo(verb, self.world, *map(str, arguments))

    def accounting(self, *rows: tuple[int, int | None, str], code: int = 0) -> None:
        """What sacct says of jobs: id, task or None, state."""
        now = int(time.time())
        lines = [
            f"{job}{'' if task is None else f'_{task}'}|{state}|{code}:0|0:0|61|{now}|n1|None"
            for job, task, state in rows
        ]
        self.tools.accounting("\n".join(lines))


def say(part: PartFolder, *, task: int = 0, restart: int = 0, node: int = 0, **said: Any) -> None:
    """Leave the word of a process."""
    usual = {"verb": "train", "code": 0, "message": "", "result": None, "progress": None}
    more = {"requeue": False, "host": "n1", "time": time.time()}
    path = part.word(task, restart, node)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**usual, **more, **said}))


def make(root: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> Site:
    """Lay the files out."""
    tree: dict[str, Any] = {
        "model": {"family": "wan2.1", "path": str(root / "no model")},
        "source": {"kind": "merged", "path": str(root / "clips")},
        "shards": {"path": str(root / "shards")},
        "run_dir": str(root / "run"),
        "generate": {"prompts": str(root / "prompts.json")},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump({**tree, **recipe}))
    (root / "prompts.json").write_text('["a red square moves right"]')
    folder = root / "bin"
    folder.mkdir()
    tools, found = Tools(folder, monkeypatch), StandIns(folder)
    tools.control(MAX_ARRAY)
    found.sbatch()
    found.recorder().rename(folder / "srun")
    return Site(root, tools, found)
