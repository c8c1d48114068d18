# SPDX-License-Identifier: Apache-2.0
"""Processes that train as one: their groups, how they hold the weights, what they agree on."""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastvideo.config.parallel import Parallel
from fastvideo.cost.layout import Layout
from fastvideo.models import weights
from fastvideo.models.sequence import SequenceParallel
from fastvideo.train.process import Process
from fastvideo.train.saver import Copy

MARGIN_S = 600.0
"""A collective gives up this much later than a hang is told, so that the watch comes first."""


@dataclass(frozen=True)
class Team:
    """This process among those that train together; alone it has no groups."""

    process: Process
    layout: Layout
    device: str
    """``cpu`` or ``cuda``, the current GPU of this process."""
    mesh: DeviceMesh | None = None
    """(replicate, shard), where weights are spread."""
    sequence: SequenceParallel | None = None
    control: dist.ProcessGroup | None = None
    """For small numbers on the host."""
    saving: dist.ProcessGroup | None = None
    """For checkpoints that are written while training goes on."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.process.rank == 0

    @property
    def place(self) -> int:
        """Number of our group among those that samples are dealt out to."""
        return self.process.rank // self.layout.sequence

    @property
    def copy(self) -> Copy:
        """Which copy of the weights this process holds, or a part of."""
        return Copy(self.process.rank // self.layout.shard, self.layout.replicate)

    def share(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Our part of the samples of a step; the same for all that share a sample's tokens."""
        size = len(batch) // self.layout.data
        return batch[self.place * size : (self.place + 1) * size]

    def total(self, value: Tensor) -> Tensor:
        """Sum over all groups of samples; on a process's own device."""
        if self.process.count > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.layout.sequence
        return value

    def any(self, *flags: bool) -> list[bool]:
        """Tell of each flag whether one process at least raised it; waits for all."""
        return [bool(flag) for flag in self.largest(*map(float, flags))]

    def agreed(self, value: Any) -> Any:
        """What process 0 has, in all of them: file systems of a cluster may lag."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control, group_src=0)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in their order; for small values."""
        if self.control is None:
            return [value]
        values = [None] * self.process.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes; waits for all."""
        if self.control is None:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.control)
        return [float(number) for number in numbers]


Choose = Callable[[float | None], Layout]
"""The memory of a GPU, GiB, to the layout of all processes."""


@contextlib.contextmanager
def joined(
    process: Process, spec: Parallel, *, device: str, hang_s: float, choose: Choose
) -> Iterator[Team]:
    """Join the processes that the launcher started, and part from them at the end.

    Args:
        process: This one.
        spec: The recipe's ``parallel``.
        device: ``cpu`` or ``cuda``.
        hang_s: When one that does not get on is taken for hanging.
        choose: Called with the memory of the smallest GPU of all, GiB, or None without GPUs.
    """
    if device == "cuda":
        torch.cuda.set_device(process.local_rank)
    if process.count == 1 and not spec.cpu_offload:
        yield Team(process, choose(_memory_gib(device)), device)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        rank=process.rank,
        world_size=process.count,
        store=dist.HashStore() if process.count == 1 else None,
        timeout=datetime.timedelta(seconds=hang_s + MARGIN_S),
    )
    layout = choose(_least(_memory_gib(device)))
    yield _team(process, layout, device, timeout_s=hang_s + MARGIN_S)
    # Not on the way out of an error: the others do not come.
    dist.barrier()
    dist.destroy_process_group()


def _memory_gib(device: str) -> float | None:
    if device == "cpu":
        return None
    return torch.cuda.get_device_properties("cuda").total_memory / 2**30


def _least(memory_gib: float | None) -> float | None:
    """The least of all processes, so that all choose the same layout."""
    if memory_gib is None:
        return None
    least = torch.tensor(memory_gib, dtype=torch.float64)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)  # on the host
    return float(least)


def _team(process: Process, layout: Layout, device: str, *, timeout_s: float) -> Team:
    names = ("replicate", "shard")
    mesh = init_device_mesh(device, (layout.replicate, layout.shard), mesh_dim_names=names)
    sequence, shared = None, []
    if layout.sequence > 1:
        groups = (layout.data, layout.sequence)
        samples = init_device_mesh(device, groups, mesh_dim_names=("data", "sequence"))
        shared = samples.get_all_groups()
        sequence = SequenceParallel(shared[1])
    timeout = datetime.timedelta(seconds=timeout_s)
    control, saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    assert isinstance(control, dist.ProcessGroup) and isinstance(saving, dist.ProcessGroup)
    for group in [*mesh.get_all_groups(), *shared]:
        _set_pg_timeout(timeout, group)  # meshes take the default
    return Team(process, layout, device, mesh, sequence, control, saving)


def is_spread(spec: Parallel, layout: Layout) -> bool:
    """Whether weights are DTensors: sharded, or brought from the host block by block."""
    return layout.shard > 1 or spec.cpu_offload


def place(model: nn.Module, team: Team, spec: Parallel, *, dtype: torch.dtype) -> None:
    """Give a model on the meta device memory, as the layout says; its numbers are still to come.

    Args:
        model: Its blocks have our forward, see ``Family.attach``.
        team: Who holds it.
        spec: Dtype of the sums, and whether the host holds the weights.
        dtype: Of the computation. In bfloat16, what is gathered has the dtype in which autocast
            would compute with it; the parameters themselves stay float32.
    """
    if not is_spread(spec, team.layout):
        weights.materialise(model, team.device)
        return
    _spread(model, team, spec, dtype=dtype)
    weights.materialise(model, "cpu" if spec.cpu_offload else team.device)
    if spec.cpu_offload:
        _bring_plain(model, team.device)


def _spread(model: nn.Module, team: Team, spec: Parallel, *, dtype: torch.dtype) -> None:
    assert team.mesh is not None
    mixed = dtype != torch.float32
    offload = CPUOffloadPolicy(pin_memory=team.device == "cuda")
    options: dict[str, Any] = {
        "mesh": team.mesh if team.layout.replicate > 1 else team.mesh["shard"],
        "offload_policy": offload if spec.cpu_offload else OffloadPolicy(),
        "ignored_params": _left_in_float32(model) if mixed else set(),
    }
    sums = getattr(torch, spec.reduce_dtype)
    computed = MixedPrecisionPolicy(
        param_dtype=dtype if mixed else None, reduce_dtype=sums, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(reduce_dtype=sums, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, TimestepEmbedding):
            fully_shard(module, mp_policy=exact, **options)
    for layer in _layers(model):
        fully_shard(layer, mp_policy=computed, **options)
    fully_shard(model, mp_policy=computed, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # our losses are shares of the batch: sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a transformer, in lists of it."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def _left_in_float32(model: nn.Module) -> set[nn.Parameter]:
    """What autocast does not touch: all but the weights of projections; small, so each has all."""
    projections = (nn.Linear, nn.Conv3d, nn.Conv2d)
    left = set(model.parameters())
    for module in model.modules():
        if isinstance(module, projections):
            left -= set(module.parameters(recurse=False))
    return left


def _bring_plain(model: nn.Module, device: str) -> None:
    """Bring to the device what is not spread: FSDP moves only its own."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                moved = nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad)
                setattr(module, name, moved)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


class Runner:
    """Forward and backward passes whose gradients are, in the end, sums over all processes."""

    def __init__(self, model: nn.Module, team: Team, spec: Parallel) -> None:
        """``model`` holds its numbers."""
        self.model, self._team = model, team
        self._whole: DistributedDataParallel | None = None
        spread = is_spread(spec, team.layout)
        if team.process.count > 1 and not spread:
            self._whole = _replicated(model, getattr(torch, spec.reduce_dtype))
        self._plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
        if not spread:
            self._plain = []

    def __call__(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """Predict the flow."""
        model = self.model
        if self._whole is not None and torch.is_grad_enabled():
            model = self._whole
        out: Tensor = model(**arguments)
        return out

    def micro_batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around the passes of a micro-batch: what can wait for the last one is summed then."""
        if self._whole is not None:
            return contextlib.nullcontext() if last else self._whole.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Sum the gradients of what is not spread, after the last micro-batch."""
        if self._team.process.count == 1:
            return
        gradients = [p.grad for p in self._plain if p.grad is not None]
        if gradients:
            together = _flatten_dense_tensors(gradients)
            dist.all_reduce(together)
            parts = _unflatten_dense_tensors(together, gradients)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part)


def _replicated(model: nn.Module, dtype: torch.dtype) -> DistributedDataParallel:
    """Whole copies that sum their gradients in buckets.

    Looking for unused parameters is not needed for its own sake: without it torch sorts the buckets
    anew after the first step, and a resumed run would add in another order than one that went on.
    """
    whole = DistributedDataParallel(
        model,
        init_sync=False,
        broadcast_buffers=False,  # they are computed, and the same everywhere
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )
    whole.register_comm_hook(dtype, _sum)
    return whole


def _sum(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer.to(dtype), async_op=True)
    assert work is not None
    summed: Callable[[Any], Tensor] = lambda future: buffer.copy_(future.value()[0])  # noqa: E731
    future: torch.futures.Future[Tensor] = work.get_future().then(summed)
    return future
