# SPDX-License-Identifier: Apache-2.0
"""What is written down of a job when it is submitted: its parts, and what Slurm calls them.

``job.json`` is written before anything is submitted and again after each part, so that nothing that
was handed over is forgotten when the submitting process dies.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from fastvideo import atomic
from fastvideo.launch.folder import JobFolder
from fastvideo.state import RunDir

SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """A part of a job, as it was handed over."""

    name: str
    verb: str
    after: tuple[str, ...]
    """Names of parts that have to succeed before."""
    tasks: tuple[int, ...] | None
    """Numbers of an array's tasks; None for one that is none."""
    nodes: int
    slurm_id: str | None = None
    """None before it is submitted, and where there is no Slurm."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of its tasks; 0 where there is no array."""
        return (0,) if self.tasks is None else self.tasks


@dataclass(frozen=True)
class Record:
    """A job, as it was submitted."""

    verb: str
    command: tuple[str, ...]
    """What submits it again."""
    executor: Literal["local", "slurm"]
    submitter: Literal["submitit", "sbatch"]
    host: str
    """Where it was submitted, and runs if it is local."""
    created: float
    """Seconds of the Unix epoch."""
    parts: tuple[Part, ...]
    refused: str = ""
    """Why it was not submitted after all; parts that were are cancelled."""

    def write(self, folder: JobFolder) -> None:
        """Write it to its place."""
        value = {"schema": SCHEMA, **dataclasses.asdict(self)}
        atomic.write_json(folder.record, value, point="job")

    @classmethod
    def read(cls, folder: JobFolder) -> Self | None:
        """Read what ``write`` wrote; None if it is not there, or of another user or version."""
        try:
            tree = atomic.read_json(folder.record)
        except PermissionError:
            return None
        if not isinstance(tree, dict) or tree.pop("schema", None) != SCHEMA:
            return None
        parts = tuple(_part(part) for part in tree.pop("parts"))
        return cls(**{**tree, "command": tuple(tree["command"]), "parts": parts})


def _part(tree: dict[str, Any]) -> Part:
    tasks = tree["tasks"]
    lists = {"after": tuple(tree["after"]), "tasks": None if tasks is None else tuple(tasks)}
    return Part(**{**tree, **lists})


def job_folders(run_dir: Path) -> Iterator[JobFolder]:
    """Folders of the jobs of a run, the newest first."""
    jobs = RunDir(run_dir).jobs
    if jobs.is_dir():
        yield from map(JobFolder, sorted(filter(Path.is_dir, jobs.iterdir()), reverse=True))
