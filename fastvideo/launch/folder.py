# SPDX-License-Identifier: Apache-2.0
"""Names of the files of jobs: a folder for each in ``run_dir/jobs``, one in it for each part."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PartFolder:
    """What the processes of a part leave; ``FASTVIDEO_JOB_DIR`` names it to them.

    Tasks are numbered as in the array, and 0 where there is none. A restart is a start of the same
    task of the same job after Slurm requeued it, counted from 0.
    """

    root: Path

    def log(self, task: int | None) -> Path:
        """What a task says, of all its starts; None for a part without an array."""
        return self.root / ("log.txt" if task is None else f"log-{task}.txt")

    @property
    def ended(self) -> Path:
        """Folder of the files that say how processes ended."""
        return self.root / "ended"

    def word(self, task: int, restart: int, node: int) -> Path:
        """How a verb ended, in its own words: see ``fastvideo.launch.word``."""
        return self.ended / f"{task}.{restart}.{node}.json"

    def requeue(self, task: int) -> Path:
        """Its presence asks for the task to be queued again.

        It was stopped by the queue and all is saved. What queues it again renames it to
        ``requeued``.
        """
        return self.root / "requeue" / str(task)

    def requeued(self, task: int, restart: int) -> Path:
        """Says that the start ``restart`` of the task ended by being queued again."""
        return self.root / "requeue" / f"{task}.{restart}"

    @property
    def local(self) -> Path:
        """How far the tasks of a local job are, written by its controller."""
        return self.root / "local.json"


@dataclass(frozen=True)
class JobFolder:
    """The folder of one submission."""

    root: Path

    @property
    def name(self) -> str:
        """``20261129-093000-train-1f3a``."""
        return self.root.name

    @property
    def record(self) -> Path:
        """What was submitted, with the ids of Slurm, see ``fastvideo.launch.record``."""
        return self.root / "job.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe as it was when the job was submitted."""
        return self.root / "recipe.yaml"

    def part(self, name: str) -> PartFolder:
        """Files of a part."""
        return PartFolder(self.root / name)

    def script(self, name: str) -> Path:
        """What is run for a part: text that sbatch takes."""
        return self.root / f"{name}.sbatch"
