# SPDX-License-Identifier: Apache-2.0
"""A job of Wan2.2 A14B for tests: its two experts, how it trained, and what that left behind."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo.config.recipe import Recipe
from fastvideo.models.family import Batch
from fastvideo.models.tiny import write_tiny
from fastvideo.models.wan22_a14b import Wan22A14B
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, read_checkpoint_marker
from fastvideo.train import worker
from fastvideo.train.launcher import train
from tests.records import exact
from tests.tiny_world import Done, Pair, World, fastvideo, in_fork, make_world, passes

HIGH, LOW = "transformer", "transformer_2"
ACCUMULATED = ("train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=2")
"""Four optimizer steps of two micro-batches each; checkpoints after 2 and 4."""


def preprocessed(root: Path) -> World:
    """A job of text-to-video."""
    write_tiny(root / "model", family="wan2.2-a14b", task="t2v")
    pair = Pair("wan2.2-a14b", "t2v")
    world = make_world(root, clips=3, heldout=1, model=root / "model", pair=pair)
    assert in_fork(lambda: preprocess(world.load())) == 0
    return world


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run of both experts that nothing disturbed."""

    run_dir: Path
    fault_points: list[str]
    timesteps: dict[str, list[float]]
    """Those that the transformers were called with, by expert, held-out ones included."""


def train_undisturbed(world: World) -> Trained:
    run_dir, log = world.root / "undisturbed", world.root / "faults.log"
    seen = world.root / "timesteps.jsonl"
    recipe = world.load(f"run_dir={run_dir}", *ACCUMULATED)

    def watched() -> None:
        arguments = Wan22A14B.arguments
        training = worker.train

        def noted(self: Any, batch: Batch) -> dict[str, torch.Tensor]:
            given = arguments(self, batch)
            with open(seen, "a", encoding="utf-8") as lines:
                lines.write(json.dumps([expert[-1], given["timestep"].tolist()]) + "\n")
            return given

        expert: list[str] = []

        def told(recipe: Recipe, **rest: Any) -> None:
            expert.append(rest["transformer"])
            training(recipe, **rest)

        # of this forked process only
        Wan22A14B.arguments = noted  # type: ignore[method-assign]
        worker.train = told
        train(recipe)

    assert in_fork(watched, fault_log=log) == 0
    found: dict[str, list[float]] = {HIGH: [], LOW: []}
    for expert, timesteps in map(json.loads, seen.read_text().splitlines()):
        found[expert] += timesteps
    return Trained(run_dir, passes(log), found)


def train_there(world: World, run_dir: Path, *overrides: str) -> Done:
    return fastvideo("train", world, f"run_dir={run_dir}", *ACCUMULATED, *overrides, "--json")


def ran(done: Done) -> dict[str, bool]:
    """Which experts a command trained."""
    assert done.code == 0, done.err
    return {name: about["ran"] for name, about in json.loads(done.out)["trained"].items()}


def assert_same(run_dir: Path, expected: Path, *, folders: Sequence[str] = (HIGH, LOW)) -> None:
    """Equal records and, bit for bit, equal numbers."""
    for folder in folders:
        assert records(run_dir, folder) == records(expected, folder), folder
        found, wanted = numbers(run_dir, folder), numbers(expected, folder)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert equal(found[name], value), f"{folder}{name}"


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def records(run_dir: Path, folder: str) -> list[dict[str, Any]]:
    """Metrics of one expert without times."""
    lines = RunDir(run_dir).training(folder).metrics.read_text().splitlines()
    return [exact(json.loads(line)) for line in lines]


def losses(run_dir: Path, folder: str) -> list[float]:
    return [record["loss"] for record in records(run_dir, folder) if "loss" in record]


def losses_if_any(run_dir: Path, folder: str) -> list[float]:
    return losses(run_dir, folder) if RunDir(run_dir).training(folder).metrics.exists() else []


def numbers(run_dir: Path, folder: str, step: int = 4) -> dict[str, Any]:
    """Every number of a checkpoint: weights and optimizer."""
    file = run_dir / f"{folder}.pt"
    dcp_to_torch_save(RunDir(run_dir).training(folder).checkpoint(step), file)
    return dict(flat(torch.load(file)))


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from flat(value, f"{prefix}/{name}")
    else:
        yield prefix, tree


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def identity(run_dir: Path, folder: str) -> str:
    """A checkpoint has a new one whenever it is written."""
    marker = read_checkpoint_marker(RunDir(run_dir).training(folder).checkpoint(4))
    assert marker is not None
    return str(marker["id"])
