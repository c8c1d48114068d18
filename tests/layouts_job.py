# SPDX-License-Identifier: Apache-2.0
"""A training of a tiny model on a number of forked processes, and what it did."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo import log, state
from fastvideo.hashing import fingerprint
from fastvideo.state import RunDir, ShardStore
from fastvideo.train import inputs, worker
from fastvideo.train.draw import Draw, Drawn
from fastvideo.train.process import Process
from tests.ranks import NoStop, Silent, in_ranks
from tests.tiny_world import World, start_fork


@dataclass(frozen=True)
class Layout:
    """A row of the ``parallel`` table."""

    replicate: int = 1
    shard: int = 1
    sequence: int = 1

    @property
    def processes(self) -> int:
        return self.replicate * self.shard

    def overrides(self) -> tuple[str, ...]:
        table = {"replicate": self.replicate, "shard": self.shard, "sequence": self.sequence}
        return tuple(f"parallel.{key}={value}" for key, value in table.items())

    def __str__(self) -> str:
        names = {"ddp": self.replicate, "fsdp": self.shard, "sp": self.sequence}
        return "-".join(f"{name}{size}" for name, size in names.items() if size > 1) or "one"


@dataclass(frozen=True)
class Seen:
    """A sample as a process was given it: its epoch and place, and hashes of noise and sigma."""

    epoch: int
    index: int
    noise: str
    sigma: float


def train_in(world: World, run_dir: Path, layout: Layout, *overrides: str) -> list[list[Seen]]:
    """Train in forked processes; the samples that each of them was given, in order."""
    return in_ranks(layout.processes, work_of(world, run_dir, layout, overrides), join=False)


def start_training(
    world: World,
    run_dir: Path,
    layout: Layout,
    *overrides: str,
    environments: Sequence[Mapping[str, str]],
) -> list[int]:
    """Start the processes of a training, each with an environment; their ids."""
    work = work_of(world, run_dir, layout, overrides)
    return [
        start_fork(functools.partial(_ended_well, work, rank), environment=environment)
        for rank, environment in enumerate(environments)
    ]


def _ended_well(work: Callable[[int], object], rank: int) -> None:
    work(rank)


def work_of(
    world: World, run_dir: Path, layout: Layout, overrides: Sequence[str]
) -> Callable[[int], list[Seen]]:
    """What each process does."""
    recipe = world.load(f"run_dir={run_dir}", *layout.overrides(), *overrides)
    store = ShardStore(recipe.shards.path)
    plan = state.complete_plan(store)
    (transformer,) = recipe.transformers
    about = inputs.facts(recipe, store, plan)[transformer]

    def work(rank: int) -> list[Seen]:
        log.setup()
        seen: list[Seen] = []
        drawing = Draw.training
        Draw.training = functools.partialmethod(_remembered, drawing, seen)  # type: ignore
        process = Process(NoStop(), Silent(), rank, rank, layout.processes)
        worker.train(recipe, transformer=transformer, plan=plan, about=about, process=process)
        return seen

    return work


def _remembered(self: Draw, drawing: Any, seen: list[Seen], place: Any) -> Drawn:
    drawn: Drawn = drawing(self, place)
    noise = fingerprint(drawn.noise.numpy().tobytes().hex())
    seen.append(Seen(place.epoch, place.index, noise, float(drawn.sigma)))
    return drawn


def in_order(seen: list[list[Seen]], layout: Layout, *, batch: int) -> list[list[Seen]]:
    """The samples of each step, in the order of the whole batch."""
    groups = seen[:: layout.sequence]
    share = batch // len(groups)
    steps = len(groups[0]) // share
    return [
        [one for group in groups for one in group[step * share : (step + 1) * share]]
        for step in range(steps)
    ]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    (file,) = run_dir.glob("train/*/metrics.jsonl")
    lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step."""
    return {r["step"]: r["loss"] for r in records(run_dir) if "loss" in r}


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """The model's tensors of a checkpoint, read in one process."""
    return stored(run_dir, step)["model"]


def stored(run_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint by part, read in one process."""
    file = run_dir / f"{step}.pt"
    dcp_to_torch_save(RunDir(run_dir).training().checkpoint(step), file)
    found: dict[str, dict[str, Tensor]] = torch.load(file)
    return found


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest relative distance of two tensors of a name, in the 2-norm."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12))
        for name in other
    )


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
