# SPDX-License-Identifier: Apache-2.0
"""The cluster: where a recipe runs. It never says what is trained."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from fastvideo.config.devices import DEVICES, find_device
from fastvideo.config.spec import Spec

OURS = """
array chdir cpus-per-task dependency error gpus-per-node gres job-name
kill-on-invalid-dep mem nodes ntasks ntasks-per-node open-mode output partition
account qos requeue no-requeue signal time parsable wrap test-only clusters wait export export-file
"""
"""Options of sbatch that follow from other keys, or that a job needs as they are."""


def _known(name: str) -> str:
    if find_device(name) is None:
        known = ", ".join(device.name for device in DEVICES)
        raise ValueError(f"{name!r} is not known; use one of {known}")
    return name


def _one_line(text: str) -> str:
    """What ends in an ``#SBATCH`` line must not end that line."""
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is empty or holds a line break or control character")
    return text


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of a variable; use letters, digits and '_'")
    if name.startswith(("FASTVIDEO_", "SLURM_")):
        raise ValueError(f"{name!r} is set by the launcher; remove it")
    return name


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError(f"{value!r} holds a zero character, which no variable can")
    return value


def _option(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(
            f"{name!r} is no long option of sbatch; write e.g. constraint or mail-type"
        )
    # sbatch takes beginnings of names as well.
    if any(ours.startswith(name) for ours in OURS.split()):
        raise ValueError(f"{name!r} follows from other keys of the cluster; remove it")
    return name


def _bind(text: str) -> str:
    host, *rest = _one_line(text).split(":")
    if not host.startswith("/") or len(rest) > 2 or any("," in part for part in (host, *rest)):
        raise ValueError(f"{text!r} is not /host, /host:/container or /host:/container:ro")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


class Container(Spec):
    """The image a job runs in."""

    kind: Literal["none", "apptainer", "pyxis", "docker"] = "none"
    """Which runtime starts it."""
    image: Line | None = None
    """A .sif file, a squashfs file or an image name."""
    binds: tuple[Annotated[str, AfterValidator(_bind)], ...] = ()
    """Host folders to mount, as `/path`, `/host:/container` or `/host:/container:ro`; those that
    the recipe names are mounted anyway, at their own place."""

    @model_validator(mode="after")
    def _image_matches_kind(self) -> Self:
        if self.kind != "none" and not self.image:
            raise ValueError(f"kind={self.kind} needs image; write the path or name of the image")
        if self.kind == "none" and self.image:
            raise ValueError(f"image={self.image!r} has no effect with kind=none; choose a runtime")
        if self.kind == "none" and self.binds:
            raise ValueError("binds has no effect with kind=none; remove it or choose a runtime")
        return self


class Resources(Spec):
    """What a job takes; what is left open is as the cluster says."""

    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs of each node; 0 for none."""
    cpus_per_task: PositiveInt | None = None
    """CPU cores of each node."""
    memory_gib: PositiveInt | None = None
    """Host memory of each node."""
    time_minutes: PositiveInt | None = None
    """Wall-clock limit."""
    partition: Line | None = None
    """Slurm partition."""
    qos: Line | None = None
    """Slurm quality of service."""
    options: dict[Annotated[str, AfterValidator(_option)], Line | None] | None = None
    """Other options of sbatch, as in `{constraint: a100, exclusive: null}`."""


class ArrayResources(Resources):
    """What each task of preprocessing takes, and how the shards are dealt out."""

    tasks: PositiveInt = 8
    """Tasks that share the shards where these are not planned yet."""
    shards_per_task: PositiveInt = 1
    """Shards of each task where they are planned: only those that are missing."""
    parallelism: PositiveInt | None = None
    """Tasks that may run at the same time; empty leaves it to the queue."""


class Cluster(Spec):
    """An executor, its resources and the container jobs run in."""

    executor: Literal["local", "slurm"] = "local"
    """Who starts the jobs."""
    submitter: Literal["submitit", "sbatch"] = "submitit"
    """What hands jobs to Slurm: the package submitit, or sbatch itself."""
    nodes: PositiveInt = 1
    """Nodes of a training job; all other jobs take one."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs of each node; 0 for CPU only."""
    gpu_type: Line | None = None
    """Which GPUs Slurm is asked for, where it tells them apart: `a100` asks for `a100:8`."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How Slurm is asked for GPUs: `--gpus-per-node=8` or `--gres=gpu:8`."""
    device: Annotated[str, AfterValidator(_known)] | None = None
    """Model of these GPUs, for `fastvideo plan`: its memory and peak, e.g. H100-80GB."""
    cpus_per_task: PositiveInt = 4
    """CPU cores of each node's job."""
    memory_gib: PositiveInt | None = None
    """Host memory of each node; empty leaves it to the cluster."""
    time_minutes: PositiveInt | None = None
    """Wall-clock limit of a job; empty leaves it to the cluster."""
    signal_seconds: int = Field(default=120, ge=1, le=65535)
    """How long before its limit a job is asked to save its state and is queued again; it has to be
    longer than a step and a save take."""
    partition: Line | None = None
    """Slurm partition."""
    account: Line | None = None
    """Slurm account."""
    qos: Line | None = None
    """Slurm quality of service."""
    options: dict[Annotated[str, AfterValidator(_option)], Line | None] = {}
    """Other options of sbatch by their long names, as in `{constraint: a100, exclusive: null}`."""
    preprocess: ArrayResources = ArrayResources()
    """What a task of preprocessing takes instead; without `gpus_per_node` one GPU, if there are."""
    train: Resources = Resources()
    """What a node of training takes instead."""
    export: Resources = Resources()
    """What export, and planning of the shards, take instead; without `gpus_per_node` none."""
    generate: Resources = Resources()
    """What sampling takes instead; without `gpus_per_node` one GPU, if there are."""
    container: Container = Container()
    """The image jobs run in."""
    setup: Path | None = None
    """A shell file that each job reads first, for modules and limits; outside of the container."""
    environment: dict[
        Annotated[str, AfterValidator(_variable)], Annotated[str, AfterValidator(_text)]
    ] = {}
    """Variables set for every job."""
    threads: PositiveInt | None = None
    """`OMP_NUM_THREADS` of each process; empty shares the cores out."""
    interface: Line | None = None
    """Network interface over which nodes of a training talk, e.g. ib0, for NCCL and gloo; empty
    lets them find it."""
    cache_dir: Line | None = None
    """Folder on each node's own disk for what compilers keep, absolute; `%u` is the user, `%j` the
    job's id."""
    work_dir: Path | None = None
    """Folder jobs start in; empty takes the one of submission."""

    @model_validator(mode="after")
    def _device_is_of_gpus(self) -> Self:
        if self.device is not None and self.gpus_per_node == 0:
            raise ValueError(
                f"device={self.device!r} has no effect with gpus_per_node=0; say how many there are"
            )
        return self

    @model_validator(mode="after")
    def _slurm_keys_need_slurm(self) -> Self:
        if self.executor == "slurm":
            return self
        for key in ("partition", "account", "qos", "time_minutes", "interface", "gpu_type"):
            self._refuse_locally(key, getattr(self, key))
        self._refuse_locally("options", self.options or None)
        self._refuse_locally("nodes", self.nodes if self.nodes > 1 else None)
        if self.container.kind == "pyxis":
            self._refuse_locally("container.kind", "pyxis")
        for verb in ("preprocess", "train", "export", "generate"):
            table: Resources = getattr(self, verb)
            for key in ("partition", "qos", "time_minutes", "memory_gib", "options"):
                self._refuse_locally(f"{verb}.{key}", getattr(table, key))
        return self

    def _refuse_locally(self, key: str, value: object) -> None:
        if value is not None:
            raise ValueError(
                f"{key}={value!r} has no effect with executor=local; remove it or set executor: "
                "slurm"
            )

    @model_validator(mode="after")
    def _caches_are_absolute(self) -> Self:
        if self.cache_dir is not None and not self.cache_dir.startswith("/"):
            raise ValueError(f"cache_dir={self.cache_dir!r} is not absolute, e.g. /tmp/cache-%u")
        return self

    @model_validator(mode="after")
    def _docker_has_the_node_for_itself(self) -> Self:
        shared = self.gpus_per_node and "exclusive" not in self.options
        if self.executor == "slurm" and self.container.kind == "docker" and shared:
            raise ValueError(
                "container.kind=docker: shows a job all GPUs of a node, also those of other jobs; "
                "add options: {exclusive: null}, or use apptainer or pyxis"
            )
        return self

    def resources(self, verb: Literal["preprocess", "train", "export", "generate"]) -> Resources:
        """What a job of ``verb`` takes, with everything filled in that the cluster says."""
        own: Resources = getattr(self, verb)
        usual = {"train": self.gpus_per_node, "export": 0}.get(verb, min(1, self.gpus_per_node))
        return Resources(
            gpus_per_node=usual if own.gpus_per_node is None else own.gpus_per_node,
            cpus_per_task=own.cpus_per_task or self.cpus_per_task,
            memory_gib=own.memory_gib or self.memory_gib,
            time_minutes=own.time_minutes or self.time_minutes,
            partition=own.partition or self.partition,
            qos=own.qos or self.qos,
            options={**self.options, **(own.options or {})},
        )
