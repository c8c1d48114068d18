# SPDX-License-Identifier: Apache-2.0
"""A part of a job as text for sbatch: options, and a body that runs the verb once on each node.

Nothing here looks at the machine, so the same part always gives the same text. Values reach the
shell through ``shlex.quote`` alone.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config.cluster import Cluster
from fastvideo.errors import UserError
from fastvideo.launch.container import Entered, enter
from fastvideo.launch.job import Array, JobSpec
from fastvideo.launch.word import JOB_DIR, RESTART, TASK
from fastvideo.state import ranges
from fastvideo.train.node.nodes import VARIABLES

SRUN = ("--kill-on-bad-exit=1", "--wait=60", "--export=ALL")
"""One node's failure ends the others', at once; so does its end, a minute later. Where a site or a
user says ``--export=NONE`` the variables of the script still reach the step."""
SHIELD = """bash -c "trap '' TERM USR2; exec \\"\\$@\\"" -"""
"""No request to stop ends a process before it listens to them; Slurm ends it in its own time."""
OF_STEP = (JOB_DIR, TASK, RESTART, *VARIABLES)
FROM_SLURM = ("SLURM_PROCID", "SLURM_JOB_ID")
FROM_OUTSIDE = ("CUDA_VISIBLE_DEVICES", "HOME", "USER", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE")
"""What a process needs to see in a container beside what the cluster and the body set."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Below those that Linux gives to outgoing connections, from 32768."""

Options = dict[str, str | None]


@dataclass(frozen=True)
class Rendered:
    """What sbatch is given."""

    options: Options
    """Long options with their values, None for flags."""
    body: str
    """A bash script without them."""

    @property
    def script(self) -> str:
        """The whole text."""
        lines = [f"#SBATCH --{sbatch_option(*item)}" for item in self.options.items()]
        return "\n".join(["#!/bin/bash", *lines, self.body])


def sbatch_option(name: str, value: str | None) -> str:
    """``name`` or ``name='quoted value'``."""
    return name if value is None else f"{name}={shlex.quote(value)}"


def render(spec: JobSpec, *, after: Sequence[str] = ()) -> Rendered:
    """The text for a part.

    Args:
        spec: The part.
        after: Ids of the jobs of Slurm that have to succeed before.

    Raises:
        UserError: A path cannot be told to Slurm or to the container's runtime.
    """
    return Rendered(_options(spec, after), "\n".join(_body(spec)) + "\n")


def environment(spec: JobSpec) -> dict[str, str]:
    """What the cluster sets for the processes of a part; ``%u`` and ``%j`` are still in it."""
    cluster = spec.cluster
    found: dict[str, str] = {}
    if cluster.container.kind != "none":
        # Packages of the host and of the home are none of the image's.
        found |= {"PYTHONNOUSERSITE": "1", "PYTHONPATH": "", "PYTHONHOME": ""}
    if cluster.threads:
        found["OMP_NUM_THREADS"] = str(cluster.threads)
    if cluster.interface:
        found["NCCL_SOCKET_IFNAME"] = found["GLOO_SOCKET_IFNAME"] = cluster.interface
    return {**found, **cluster.environment}


def caches(cluster: Cluster) -> dict[str, str]:
    """Where compilers keep what they made; ``%u`` stands for the user, ``%j`` for the job."""
    if not cluster.cache_dir:
        return {}
    folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {
        name: f"{cluster.cache_dir}/{folder}"
        for name, folder in folders.items()
        if name not in cluster.environment
    }


def pieces(template: str) -> list[str]:
    """A path cut at ``%u`` and ``%j``, which are pieces of their own."""
    return [piece for piece in re.split("(%[uj])", template) if piece]


def entered(spec: JobSpec, *, slurm: bool) -> Entered:
    """How the container is entered, if there is one."""
    cluster = spec.cluster
    names = [*OF_STEP, *environment(spec), *caches(cluster), *(FROM_SLURM if slurm else ())]
    names += [name for name in FROM_OUTSIDE if name not in names]
    shared = [*spec.binds, *_cache_folders(cluster)]
    return enter(
        cluster.container,
        folders=[folder for folder in shared if not _is_mounted(folder, cluster, shared)],
        work_dir=spec.work_dir,
        variables=names,
        gpus=spec.resources.gpus_per_node or 0,
    )


def _cache_folders(cluster: Cluster) -> list[Path]:
    """The part of the cache's path that is the same for all jobs."""
    if not cluster.cache_dir:
        return []
    folder = Path(cluster.cache_dir)
    return [next(path for path in (folder, *folder.parents) if "%" not in str(path))]


def _is_mounted(folder: Path, cluster: Cluster, others: Sequence[Path]) -> bool:
    """Whether a folder comes with another one; Apptainer shows /tmp of itself."""
    below = any(folder != other and folder.is_relative_to(other) for other in others)
    return below or (cluster.container.kind == "apptainer" and folder.is_relative_to("/tmp"))


# ---------------------------------------------------------------- options


def _options(spec: JobSpec, after: Sequence[str]) -> Options:
    cluster, needs = spec.cluster, spec.resources
    log = "log-%a.txt" if spec.array else "log.txt"
    found: Options = {
        "job-name": spec.label,
        "chdir": _path(spec.work_dir),
        "output": _path(spec.folder).replace("%", "%%") + f"/{log}",
        "open-mode": "append",
        "nodes": str(spec.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(needs.cpus_per_task),
        "signal": f"USR2@{cluster.signal_seconds}",
        "requeue": None,
    }
    if needs.gpus_per_node:
        number = ":".join(filter(None, [cluster.gpu_type, str(needs.gpus_per_node)]))
        gres = cluster.gpu_option == "gres"
        found["gres" if gres else "gpus-per-node"] = f"gpu:{number}" if gres else number
    asked = {
        "mem": needs.memory_gib and f"{needs.memory_gib}G",
        "time": needs.time_minutes and str(needs.time_minutes),
        "partition": needs.partition,
        "account": cluster.account,
        "qos": needs.qos,
    }
    found.update({name: value for name, value in asked.items() if value})
    if spec.array:
        found["array"] = array_ids(spec.array)
    if after:
        found |= {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"}
    return {**found, **(needs.options or {})}


def _path(path: Path) -> str:
    """A path for an option, which is one line in which a backslash has a meaning of its own."""
    text = str(path)
    if not text.isprintable() or "\\" in text:
        raise UserError(
            f"{text!r}: Slurm takes no path with a backslash, line break or control character; "
            "rename the folder"
        )
    return text


def array_ids(array: Array) -> str:
    """``3,7,9-12%4``."""
    text = ranges(array.values)
    return f"{text}%{array.parallelism}" if array.parallelism else text


# ---------------------------------------------------------------- body


def _body(spec: JobSpec) -> list[str]:
    return [
        *_setup(spec.cluster),
        "set -uo pipefail",
        'unset "${!SQUEUE_@}"  # filters of the user, which could hide the job from itself',
        "trap : TERM USR2  # meant for the processes of the step, which get them too",
        *_exports(spec),
        *_values(spec.array),
        "status=0",
        f"{_step(spec)} || status=$?",
        *_requeue(spec),
        'exit "$status"',
    ]


def _setup(cluster: Cluster) -> list[str]:
    return [f"source {shlex.quote(str(cluster.setup))} || exit"] if cluster.setup else []


def _exports(spec: JobSpec) -> list[str]:
    ports = f"{FIRST_PORT} + (10 * SLURM_JOB_ID + 2 * FASTVIDEO_RESTART) % {PORTS}"
    return [
        f"export FASTVIDEO_JOB_DIR={shlex.quote(str(spec.folder))}",
        "export FASTVIDEO_TASK=${SLURM_ARRAY_TASK_ID:-0}",
        "export FASTVIDEO_RESTART=${SLURM_RESTART_COUNT:-0}",
        "export FASTVIDEO_LAUNCH_ID=$SLURM_JOB_ID-$FASTVIDEO_RESTART",
        "export FASTVIDEO_NODES=$SLURM_JOB_NUM_NODES",
        r"export FASTVIDEO_NODE_RANK=\$SLURM_PROCID  # each process looks there",
        f"export FASTVIDEO_RENDEZVOUS=$SLURMD_NODENAME:$(({ports}))",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(spec).items()),
        *(f"export {name}={_expanded(value)}" for name, value in caches(spec.cluster).items()),
    ]


def _expanded(template: str) -> str:
    """A word of the shell with ``%u`` and ``%j`` filled in when it runs."""
    marks = {"%u": '"${USER:-$UID}"', "%j": '"$SLURM_JOB_ID"'}
    return "".join(marks.get(piece) or shlex.quote(piece) for piece in pieces(template))


def _values(array: Array | None) -> list[str]:
    if array is None:
        return []
    pairs = (f"[{number}]={shlex.quote(text)}" for number, text in sorted(array.values.items()))
    return [f"values=({' '.join(pairs)})"]


def _step(spec: JobSpec) -> str:
    """The command that runs on each node."""
    way = entered(spec, slurm=True)
    flags = [*SRUN, f"--cpus-per-task={spec.resources.cpus_per_task}"]
    words = [*way.prefix, *spec.program, *spec.command]
    own = f' {spec.array.option} "${{values[$FASTVIDEO_TASK]}}"' if spec.array else ""
    return f"{shlex.join(['srun', *flags, *way.srun])} {SHIELD} {shlex.join(words)}{own}"


def _requeue(spec: JobSpec) -> list[str]:
    """Queue the job again where its step was stopped by the queue and has saved its state.

    Not where Slurm does so itself, nor where the job was cancelled: then it runs no more.
    """
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if spec.array else "$SLURM_JOB_ID"
    return [
        f"note=$FASTVIDEO_JOB_DIR/requeue/$FASTVIDEO_TASK job={job}",
        'if [[ -e $note && $(squeue -h -o %T -j "$job") == RUNNING ]]; then',
        '  mv "$note" "$note.$FASTVIDEO_RESTART" && scontrol requeue "$job"',
        "fi",
    ]
