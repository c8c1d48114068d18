# SPDX-License-Identifier: Apache-2.0
"""What is launched: a part of a job, in plain values that a renderer turns into a script."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config.cluster import Cluster, Resources


@dataclass(frozen=True)
class Array:
    """Tasks that differ in the value of one option."""

    option: str
    """``--shards`` or ``--every``."""
    values: Mapping[int, str]
    """The option's value by the number of the task."""
    parallelism: int | None = None
    """How many may run at the same time."""


@dataclass(frozen=True)
class JobSpec:
    """One part of a job: one job of Slurm, or one array."""

    name: str
    """Unique in its job: ``manifest``, ``preprocess``, ``train``, ``train-high``, ..."""
    command: tuple[str, ...]
    """What follows the program: verb, recipe, options."""
    resources: Resources
    """What it needs, with nothing left open that the cluster says."""
    cluster: Cluster
    """Where it runs."""
    folder: Path
    """Absolute; where its processes leave word and its logs go, see ``PartFolder``."""
    work_dir: Path
    """Absolute; where it starts."""
    label: str = "fastvideo"
    """What queues show it as."""
    nodes: int = 1
    """Nodes that it runs on, the verb once on each."""
    program: tuple[str, ...] = ("fastvideo",)
    """What runs verbs, inside of the container if there is one."""
    after: tuple[str, ...] = ()
    """Parts of the same job that have to succeed before."""
    array: Array | None = None
    """Several tasks instead of one."""
    binds: tuple[Path, ...] = ()
    """Folders that a container has to show, absolute."""

    def argv(self, task: int = 0) -> tuple[str, ...]:
        """The command line of a task, without what starts a container around it."""
        of_task = (self.array.option, self.array.values[task]) if self.array else ()
        return (*self.program, *self.command, *of_task)
