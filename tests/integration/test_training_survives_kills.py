# SPDX-License-Identifier: Apache-2.0
"""Training killed at every fault point of a save and at random goes on bit for bit."""

import json
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir
from fastvideo.train.launcher import train
from tests.records import exact
from tests.tiny_world import World, in_fork, make_world, passes

KILLED = -9
RANDOM_KILLS = 10
SHORT = ("train.steps=4", "train.checkpoint.keep_last=1")
Result = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    root = tmp_path_factory.mktemp("training")
    world = make_world(root, clips=5, heldout=1, model=tiny_model)
    assert in_fork(lambda: preprocess(world.load(*SHORT))) == 0
    return world


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[Result, list[str], float]:
    log = world.root / "faults.log"
    begin_s = time.perf_counter()
    assert in_fork(lambda: train(world.load(*SHORT)), fault_log=log) == 0
    seconds = time.perf_counter() - begin_s
    found = result(world)
    shutil.rmtree(world.run_dir)
    return found, passes(log), seconds


def result(world: World) -> Result:
    """Records without their times, and every number of the last checkpoint."""
    directory = RunDir(world.run_dir).training()
    assert directory.complete_checkpoints() == [4], "keep_last is 1"
    lines = directory.metrics.read_text().splitlines()
    records = [exact(json.loads(line)) for line in lines]
    file = world.root / "last.pt"
    dcp_to_torch_save(directory.checkpoint(4), file)
    return records, flat(torch.load(file))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested state as one level of paths."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [flat(sub, f"{prefix}/{name}") for name, sub in tree.items()]
    return {name: value for part in parts for name, value in part.items()}


def assert_equal(found: Result, expected: Result) -> None:
    assert found[0] == expected[0]
    assert [record["step"] for record in found[0]] == [0, 1, 2, 3, 3, 4, 4]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[1][name], value), name
        else:
            assert found[1][name] == value, name


@pytest.mark.timeout(300)
def test_a_kill_at_any_fault_point_of_a_save_changes_no_bit(
    world: World, undisturbed: tuple[Result, list[str], float]
) -> None:
    expected, points, _ = undisturbed
    kinds = {point.split(":")[0] for point in points}
    assert {"checkpoint.write", "checkpoint.fsync", "checkpoint.rename"} <= kinds
    assert {"checkpoint.marker.rename", "checkpoint.prune"} <= kinds
    for point in points:
        shutil.rmtree(world.run_dir, ignore_errors=True)
        assert in_fork(lambda: train(world.load(*SHORT)), fault=point) == KILLED, point
        assert in_fork(lambda: train(world.load(*SHORT))) == 0, point
        assert_equal(result(world), expected)


@pytest.mark.timeout(300)
def test_kills_at_random_moments_change_no_bit(
    world: World, undisturbed: tuple[Result, list[str], float]
) -> None:
    expected, _, seconds = undisturbed
    moments = random.Random(1)
    killed = 0
    for attempt in range(RANDOM_KILLS):
        shutil.rmtree(world.run_dir, ignore_errors=True)
        recipe = world.load(*SHORT, f"train.loader_workers={attempt % 2}")
        for _ in range(2):  # killed twice, so that a resumed run is killed too
            code = in_fork(partial(train, recipe), kill_after_s=moments.uniform(0, seconds))
            killed += code == KILLED
        assert in_fork(lambda: train(world.load(*SHORT))) == 0
        assert_equal(result(world), expected)
    assert killed >= RANDOM_KILLS, "the kills came too late to test anything"
