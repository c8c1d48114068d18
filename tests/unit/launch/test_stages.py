# SPDX-License-Identifier: Apache-2.0
"""Tests of which parts a verb has as a job."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastvideo import hashing
from fastvideo.config.cluster import ArrayResources, Cluster, Resources
from fastvideo.config.recipe import Recipe
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import Array, JobSpec
from fastvideo.launch.stages import Asked, Ground, Verb, dealt, parts, split
from fastvideo.state import SCHEMA_VERSION, ShardStore, marker_path, ranges

SLURM = Cluster(executor="slurm", nodes=2, gpus_per_node=8, preprocess=ArrayResources(tasks=3))


def recipe(root: Path, *, family: str = "wan2.1", **train: Any) -> Recipe:
    tree = {
        "model": {"family": family, "path": str(root / "model")},
        "source": {"kind": "merged", "path": str(root / "clips")},
        "shards": {"path": str(root / "shards")},
        "run_dir": str(root / "run"),
        "train": train,
    }
    return Recipe.parse(tree, origin="recipe.yaml")


def made(
    root: Path, verb: Verb, asked: Recipe, *flags: str, cluster: Cluster = SLURM, most: int = 1001
) -> dict[str, JobSpec]:
    folder = JobFolder(root / "job")
    ground = Ground(folder, folder.recipe, root, ("fastvideo",), max_array=most)
    return {spec.name: spec for spec in parts(Asked(verb, asked, cluster, flags), ground)}


def plan(asked: Recipe, *, shards: int, done: tuple[int, ...] = (), **settings: Any) -> None:
    """Files of a plan, and of shards that are complete."""
    store = ShardStore(asked.shards.path)
    store.root.mkdir()
    store.manifest.write_bytes(b"rows")
    store.clips.write_bytes(b"")
    usual = {
        "family": asked.model.family,
        "clip": asked.clip.model_dump(mode="json"),
        "dtype": asked.shards.dtype,
        "vae_dtype": asked.shards.vae_dtype,
        "text_dtype": asked.shards.text_dtype,
    }
    tree = {
        "schema": SCHEMA_VERSION,
        "manifest_bytes": 4,
        "clips_bytes": 0,
        "settings": usual | settings,
        "shards": {
            str(index): {"rows": 1, "fingerprint": hashing.fingerprint(index)}
            for index in range(shards)
        },
    }
    store.plan.write_text(json.dumps(tree))
    for index in done:
        store.shard(index).write_bytes(b"shard")
        marker = {
            "schema": SCHEMA_VERSION,
            "bytes": 5,
            "fingerprint": hashing.fingerprint(index),
        }
        marker_path(store.shard(index)).write_text(json.dumps(marker))


# ---------------------------------------------------------------- preprocessing


def test_only_missing_shards_are_filled_under_their_own_numbers(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    plan(asked, shards=16, done=(0, 1, 2, 4, 15))
    (part,) = made(tmp_path, "preprocess", asked).values()
    assert part.array is not None
    assert ranges(part.array.values) == "3,5-14"
    assert part.argv(7) == (
        "fastvideo",
        "preprocess",
        str(tmp_path / "job/recipe.yaml"),
        "--shards",
        "7",
    )
    assert (part.nodes, part.resources.gpus_per_node) == (1, 1)


def test_a_task_may_fill_several_shards_and_is_called_by_its_first(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    plan(asked, shards=9, done=(1, 5))
    own = ArrayResources(shards_per_task=3, parallelism=2)
    (part,) = made(tmp_path, "preprocess", asked, cluster=Cluster(preprocess=own)).values()
    assert part.array == Array("--shards", {0: "0,2-3", 4: "4,6-7", 8: "8"}, 2)


def test_without_a_plan_tasks_share_what_the_manifest_will_say(tmp_path: Path) -> None:
    found = made(tmp_path, "preprocess", recipe(tmp_path))
    assert list(found) == ["manifest", "preprocess"]
    assert found["manifest"].argv()[-1] == "--manifest-only"
    assert found["manifest"].resources.gpus_per_node == 0
    filling = found["preprocess"]
    assert filling.after == ("manifest",)
    assert filling.array == Array("--every", {0: "0/3", 1: "1/3", 2: "2/3"})


@pytest.mark.parametrize("key", ["dtype", "clip", "family", "vae_dtype", "text_dtype"])
def test_a_plan_for_another_recipe_is_made_anew(tmp_path: Path, key: str) -> None:
    asked = recipe(tmp_path)
    changed: dict[str, Any] = {key: "another"}
    plan(asked, shards=2, **changed)
    assert list(made(tmp_path, "preprocess", asked)) == ["manifest", "preprocess"]


def test_with_nothing_missing_new_clips_are_looked_for(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    plan(asked, shards=2, done=(0, 1))
    assert list(made(tmp_path, "preprocess", asked)) == ["manifest", "preprocess"]


@pytest.mark.parametrize("flags", [("--manifest-only",), ("--shards", "0-3"), ("--every", "1/2")])
def test_what_is_asked_for_in_person_is_one_task(tmp_path: Path, flags: tuple[str, ...]) -> None:
    asked = recipe(tmp_path)
    plan(asked, shards=9)
    (part,) = made(tmp_path, "preprocess", asked, *flags).values()
    assert part.array is None and part.argv()[3:] == flags


def test_numbers_stay_below_what_slurm_takes(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    plan(asked, shards=25, done=(3,))
    found = made(tmp_path, "preprocess", asked, most=10)
    assert list(found) == ["preprocess", "preprocess-2", "preprocess-3"]
    arrays = [spec.array for spec in found.values()]
    assert all(array is not None and max(array.values) < 10 for array in arrays)
    values = [value for array in arrays if array for value in array.values.values()]
    assert sorted(map(int, values)) == [index for index in range(25) if index != 3]
    assert arrays[2] == Array("--shards", {0: "20", 1: "21", 2: "22", 3: "23", 4: "24"})


def test_more_tasks_than_slurm_takes_are_not_asked_for(tmp_path: Path) -> None:
    found = made(tmp_path, "preprocess", recipe(tmp_path), most=2)
    array = found["preprocess"].array
    assert array is not None and dict(array.values) == {0: "0/2", 1: "1/2"}


def test_every_shard_is_dealt_out_once() -> None:
    shards = [1, 2, 3, 7, 8, 20]
    values = dealt(shards, per_task=4, parallelism=None).values
    assert values == {1: "1-3,7", 8: "8,20"}
    arrays = split(Array("--shards", {5: "a", 12: "b"}), max_array=10)
    assert [array.values for array in arrays] == [{5: "a"}, {2: "b"}]


# ---------------------------------------------------------------- the rest


def test_training_takes_the_nodes_of_the_cluster_and_all_else_one(tmp_path: Path) -> None:
    found = made(tmp_path, "run", recipe(tmp_path))
    nodes = {name: spec.nodes for name, spec in found.items()}
    assert nodes == {"manifest": 1, "preprocess": 1, "train": 2, "export": 1, "generate": 1}
    gpus = {name: spec.resources.gpus_per_node for name, spec in found.items()}
    assert gpus == {"manifest": 0, "preprocess": 1, "train": 8, "export": 0, "generate": 1}


def test_each_stage_waits_for_the_one_before(tmp_path: Path) -> None:
    found = made(tmp_path, "run", recipe(tmp_path))
    assert {name: spec.after for name, spec in found.items()} == {
        "manifest": (),
        "preprocess": ("manifest",),
        "train": ("preprocess",),
        "export": ("train",),
        "generate": ("export",),
    }


def test_both_experts_train_side_by_side(tmp_path: Path) -> None:
    found = made(tmp_path, "run", recipe(tmp_path, family="wan2.2-a14b"), "--force")
    experts = {name: spec for name, spec in found.items() if name.startswith("train")}
    assert list(experts) == ["train-high", "train-low"]
    for name, spec in experts.items():
        expert = f"train.expert={name.removeprefix('train-')}"
        assert spec.argv()[3:] == (expert, "--force")
        assert spec.after == ("preprocess",)
    assert found["export"].after == ("train-high", "train-low")


def test_one_expert_may_be_asked_for(tmp_path: Path) -> None:
    found = made(tmp_path, "run", recipe(tmp_path, family="wan2.2-a14b", expert="low"))
    assert [name for name in found if name.startswith("train")] == ["train"]


def test_a_verb_takes_what_its_table_says_and_else_what_the_cluster_says() -> None:
    cluster = Cluster(
        executor="slurm",
        gpus_per_node=8,
        partition="gpu",
        time_minutes=600,
        options={"constraint": "h100"},
        export=Resources(partition="cpu", options={"comment": "x"}),
        train=Resources(gpus_per_node=4),
    )
    export = cluster.resources("export")
    assert (export.partition, export.time_minutes, export.gpus_per_node) == ("cpu", 600, 0)
    assert export.options == {"constraint": "h100", "comment": "x"}
    assert cluster.resources("train").gpus_per_node == 4
    assert cluster.resources("generate").gpus_per_node == 1
    assert Cluster().resources("generate").gpus_per_node == 0


def test_arrays_that_run_beside_each_other_share_the_limit() -> None:
    array = Array("--shards", {n: str(n) for n in range(30)}, parallelism=9)
    assert [part.parallelism for part in split(array, max_array=10)] == [3, 3, 3]
