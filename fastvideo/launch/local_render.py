# SPDX-License-Identifier: Apache-2.0
"""A part of a job as the local executor runs it: the same command lines and variables, no srun."""

import getpass
import shlex
from collections.abc import Sequence

from fastvideo.config.cluster import Cluster
from fastvideo.errors import UserError
from fastvideo.launch.job import JobSpec
from fastvideo.launch.local import LocalPart
from fastvideo.launch.render import caches, entered, environment, pieces


def local_part(spec: JobSpec) -> LocalPart:
    """What the local executor is told of a part.

    Raises:
        UserError: A path cannot be told to the container's runtime.
    """
    prefix = entered(spec, slurm=False).prefix
    tasks = spec.array.values if spec.array else (0,)
    job = spec.folder.parent.name
    marks = {"%u": getpass.getuser(), "%j": job}

    def filled(template: str) -> str:
        return "".join(marks.get(piece, piece) for piece in pieces(template))

    return LocalPart(
        name=spec.name,
        argv={task: (*prefix, *spec.argv(task)) for task in tasks},
        environment={
            **environment(spec),
            **{name: filled(text) for name, text in caches(spec.cluster).items()},
        },
        work_dir=spec.work_dir,
        after=spec.after,
        is_array=spec.array is not None,
        gpus=spec.resources.gpus_per_node or 0,
        parallelism=spec.array.parallelism if spec.array else None,
    )


def check(cluster: Cluster) -> None:
    """Refuse what only a queue can do."""
    if cluster.setup is not None:
        raise UserError(
            f"setup={cluster.setup}: is read by the script of a Slurm job; with executor=local "
            "source it in your own shell and remove the key"
        )


def dry_run(specs: Sequence[JobSpec]) -> str:
    """What would be run, as commands of a shell."""
    lines = []
    for spec in specs:
        part = local_part(spec)
        waits = f", after {' and '.join(part.after)}" if part.after else ""
        lines.append(f"# {part.name}: {part.gpus} GPUs a task{waits}; log in {spec.folder}")
        variables = [f"{name}={shlex.quote(value)}" for name, value in part.environment.items()]
        lines += [" ".join([*variables, shlex.join(argv)]) for argv in part.argv.values()]
    return "\n".join(lines) + "\n"
