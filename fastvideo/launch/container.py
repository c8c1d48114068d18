# SPDX-License-Identifier: Apache-2.0
"""What starts a verb in a container: flags of srun, or a command in front of it.

Apptainer and pyxis hand on the environment, but for what the image itself sets; docker is told each
name. Slurm's own commands stay outside.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config.cluster import Container
from fastvideo.errors import UserError

SEPARATORS = (":", ",", '"')
"""What separates folders for the runtimes."""


@dataclass(frozen=True)
class Entered:
    """How a container is entered."""

    srun: tuple[str, ...] = ()
    """Flags of srun, by pyxis."""
    prefix: tuple[str, ...] = ()
    """Comes before the program."""


def enter(
    container: Container,
    *,
    folders: Sequence[Path],
    work_dir: Path,
    variables: Iterable[str],
    gpus: int,
) -> Entered:
    """How a program is started in ``container``.

    Args:
        container: Runtime, image and binds of the cluster.
        folders: Mounted at their own place, beside the binds.
        work_dir: Where the program starts.
        variables: Names that it must see as they are outside.
        gpus: How many it may use; 0 for none.

    Raises:
        UserError: A folder's name cannot be told to the runtime.
    """
    if container.kind == "none":
        return Entered()
    assert container.image is not None
    _check(folders)
    binds = [*map(str, folders), *container.binds]
    if container.kind == "apptainer":
        flags = ["--nv"] if gpus else []
        flags += [word for bind in binds for word in ("--bind", bind)]
        flags += ["--pwd", str(work_dir)]
        return Entered(prefix=("apptainer", "exec", *flags, container.image))
    if container.kind == "pyxis":
        flags = [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(map(_both, binds))}",
            f"--container-workdir={work_dir}",
            f"--container-env={','.join(variables)}",
            "--no-container-mount-home",
        ]
        return Entered(srun=tuple(flags))
    flags = ["--rm", "--init", "--network=host", "--ipc=host"]
    flags += [f"--user={os.getuid()}:{os.getgid()}"]
    flags += ["--gpus=all"] if gpus else []
    flags += [f"--volume={_both(bind)}" for bind in binds]
    flags += [f"--env={name}" for name in variables]
    flags += [f"--workdir={work_dir}"]
    return Entered(prefix=("docker", "run", *flags, container.image))


def _both(bind: str) -> str:
    """``host:container``, which some runtimes want although both are the same."""
    return bind if ":" in bind else f"{bind}:{bind}"


def _check(folders: Iterable[Path]) -> None:
    for folder in folders:
        if found := [mark for mark in SEPARATORS if mark in str(folder)]:
            raise UserError(
                f"{folder}: cannot be mounted in a container, since its name holds {found[0]!r}; "
                "rename it"
            )
