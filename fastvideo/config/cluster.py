# SPDX-License-Identifier: Apache-2.0
"""The cluster: where a recipe runs. It never says what is trained."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from fastvideo.config.devices import DEVICES, find_device
from fastvideo.config.spec import Spec


def _known(name: str) -> str:
    if find_device(name) is None:
        known = ", ".join(device.name for device in DEVICES)
        raise ValueError(f"{name!r} is not known; use one of {known}")
    return name


class Container(Spec):
    """The image a job runs in."""

    kind: Literal["none", "apptainer", "pyxis", "docker"] = "none"
    """Which runtime starts it."""
    image: str | None = None
    """A .sif file, a squashfs file or an image name."""
    binds: tuple[str, ...] = ()
    """Host folders to mount, as `host:container` or `path`."""

    @model_validator(mode="after")
    def _image_matches_kind(self) -> Self:
        if self.kind != "none" and not self.image:
            raise ValueError(f"kind={self.kind} needs image; write the path or name of the image")
        if self.kind == "none" and self.image:
            raise ValueError(f"image={self.image!r} has no effect with kind=none; choose a runtime")
        return self


class Cluster(Spec):
    """An executor, its resources and the container jobs run in."""

    executor: Literal["local", "slurm"] = "local"
    """Who starts the jobs."""
    nodes: PositiveInt = 1
    """Nodes of a training job."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs of each node; 0 for CPU only."""
    device: Annotated[str, AfterValidator(_known)] | None = None
    """Model of these GPUs, for `fastvideo plan`: its memory and peak, e.g. H100-80GB."""
    cpus_per_task: PositiveInt = 4
    """CPU cores of each task."""
    memory_gib: PositiveInt | None = None
    """Host memory of each node; empty leaves it to the cluster."""
    time_minutes: PositiveInt | None = None
    """Wall-clock limit of a job; empty leaves it to the cluster."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    qos: str | None = None
    """Slurm quality of service."""
    container: Container = Container()
    """The image jobs run in."""
    environment: dict[str, str] = {}
    """Variables set for every job."""
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
        for key in ("partition", "account", "qos"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} has no effect with executor=local; "
                    "remove it or set executor: slurm"
                )
        return self
