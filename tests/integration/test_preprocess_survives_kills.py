# SPDX-License-Identifier: Apache-2.0
"""Preprocessing killed at every write, fsync and rename, and at random, ends in the same bytes."""

import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore, ledger, read_marker, shard_indices
from tests.tiny_world import World, digests, in_fork, make_world, passes

KILLED = -9
RANDOM_KILLS = 20
RESULTS = ("shard-*", "validation.*", "manifest.*", "clips.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    return make_world(tmp_path_factory.mktemp("kills"), clips=4, model=tiny_model)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> tuple[dict[str, str], list[str], float]:
    """Digests of all results, the fault points passed, and the seconds it took."""
    log = world.root / "faults.log"
    begin_s = time.perf_counter()
    assert in_fork(lambda: preprocess(world.load()), fault_log=log) == 0
    seconds = time.perf_counter() - begin_s
    found = digests(world.shards, *RESULTS)
    assert len([name for name in found if name.startswith("shard-")]) == 4
    assert_every_clip_once(world)
    shutil.rmtree(world.shards)
    return found, passes(log), seconds


def assert_every_clip_once(world: World) -> None:
    store = ShardStore(world.shards)
    plan = store.read_plan()
    assert plan is not None
    stored = []
    for index in shard_indices(plan):
        marker = read_marker(store.shard(index))
        assert marker is not None
        stored += [row["id"] for row in marker["rows"]]
    assert sorted(stored) == sorted(item["path"] for item in world.items)
    assert {row.state for row in ledger(store, plan)} == {"encoded"}


def assert_rerun_repairs(world: World, expected: dict[str, str]) -> None:
    assert in_fork(lambda: preprocess(world.load())) == 0
    assert digests(world.shards, *RESULTS) == expected
    assert not list(world.shards.glob(".*.tmp")), "a kill left a file behind for ever"
    assert_every_clip_once(world)


@pytest.mark.timeout(300)
def test_a_kill_at_any_fault_point_is_repaired_by_a_rerun(
    world: World, undisturbed: tuple[dict[str, str], list[str], float]
) -> None:
    expected, points, _ = undisturbed
    kinds = {point.split(":")[0] for point in points}
    for step in ("write", "fsync", "rename", "done"):
        assert {f"shard.parquet.{step}", f"shard.marker.{step}", f"plan.{step}"} <= kinds
    for point in points:
        if point.startswith("hashes.") and not point.endswith(":1"):
            continue  # the same write for one encoder file after the other
        shutil.rmtree(world.shards, ignore_errors=True)
        assert in_fork(lambda: preprocess(world.load()), fault=point) == KILLED, point
        assert_rerun_repairs(world, expected)


@pytest.mark.timeout(300)
def test_kills_at_random_moments_are_repaired_by_a_rerun(
    world: World, undisturbed: tuple[dict[str, str], list[str], float]
) -> None:
    expected, _, seconds = undisturbed
    moments = random.Random(0)
    killed = 0
    for attempt in range(RANDOM_KILLS):
        shutil.rmtree(world.shards, ignore_errors=True)
        recipe = world.load(f"preprocess.decode_workers={attempt % 2}")
        code = in_fork(partial(preprocess, recipe), kill_after_s=moments.uniform(0, seconds))
        killed += code == KILLED
        assert_rerun_repairs(world, expected)
    assert killed >= RANDOM_KILLS // 2, "the kills came too late to test anything"
