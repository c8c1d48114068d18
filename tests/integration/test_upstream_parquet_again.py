# SPDX-License-Identifier: Apache-2.0
"""Upstream's Parquet is prepared again: as it was, with more or other files, after a kill."""

import json
import os
from pathlib import Path

import pytest
import torch

from fastvideo import status
from fastvideo.data.adopt import adopted
from fastvideo.data.manifest import read_rows
from fastvideo.errors import UserError
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.tiny_world import digests, fastvideo, in_fork, passes
from tests.upstream_files import write_new
from tests.upstream_job import (
    T2V_PAIR,
    Job,
    Model,
    assert_as_given,
    make_job,
    models_below,
    same,
)

RESULTS = ("shard-*", "validation.*", "manifest.*", "clips.jsonl")
KILLED = -9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Folder of the tiny model of a pair."""
    return models_below(tmp_path_factory.mktemp("models"))


@pytest.fixture
def job(tmp_path: Path, model: Model) -> Job:
    return make_job(tmp_path, model(T2V_PAIR))


# ---------------------------------------------------------------- again, more, changed


def test_a_second_run_reads_and_touches_nothing(job: Job) -> None:
    write_new(job.given, job.samples(5), samples_per_file=2)
    assert job.fill() == [0, 1]
    before = {p.name: p.stat().st_mtime_ns for p in job.world.shards.iterdir()}
    for path in job.given.rglob("*.parquet"):
        size, times = path.stat().st_size, path.stat()
        path.write_bytes(bytes(size))  # a file that looks as before is not read again
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert job.fill() == []
    assert {p.name: p.stat().st_mtime_ns for p in job.world.shards.iterdir()} == before


def test_a_file_that_is_added_adds_shards_only(job: Job) -> None:
    """Also where it sorts before the others and repeats their ids."""
    job.write(job.samples(4, id="clip.mp4"), "m.parquet")
    assert job.fill() == [0, 1]
    before = digests(job.world.shards, "shard-*")
    added = job.samples(2, seed=1, id="clip.mp4")
    job.write(added, "a.parquet")
    assert job.fill() == [2]
    after = digests(job.world.shards, "shard-*")
    assert {name: after[name] for name in before} == before
    assert len(job.stored()) == 6
    assert job.fill() == []


def test_a_file_that_is_removed_takes_its_clips_along(job: Job) -> None:
    samples = job.samples(6)
    job.write(samples[:3], "a.parquet")
    path = job.write(samples[3:], "b.parquet")
    assert job.fill() == [0, 1]
    path.unlink()
    assert job.fill() == []
    assert job.stored().keys() == {sample.id for sample in samples[:3]}


def test_changed_rows_make_their_shard_anew_and_touched_files_nothing(job: Job) -> None:
    samples = job.samples(6)
    path = job.write(samples[:3], "a.parquet")
    job.write(samples[3:], "b.parquet").touch()
    assert job.fill() == [0, 1]
    path.touch()
    assert job.fill() == []
    (other,) = job.samples(1, seed=1, id=samples[1].id, caption=samples[1].caption)
    job.write([samples[0], other, samples[2]], "a.parquet")
    assert job.fill() == [0]
    assert_as_given(job.stored()[other.id], other, pair=T2V_PAIR)


def test_a_file_that_changed_after_planning_is_not_taken_for_the_old_one(job: Job) -> None:
    job.write(job.samples(3), "a.parquet")
    path = job.write(job.samples(3, seed=1), "b.parquet")
    assert job.fill(manifest_only=True) == []
    job.write(job.samples(3, seed=2), "b.parquet")
    assert job.fill(shards=[0]) == [0]
    with pytest.raises(UserError, match=r"b\.parquet: changed since"):
        job.fill(shards=[1])
    path.unlink()
    with pytest.raises(UserError, match=r"b\.parquet: is gone since"):
        job.fill(shards=[1])
    assert job.fill() == []
    assert len(job.stored()) == 3


def test_what_is_known_of_files_survives_damage_to_its_journal(job: Job) -> None:
    write_new(job.given, job.samples(4), samples_per_file=1)
    job.fill()
    journal = ShardStore(job.world.shards).listed
    lines = journal.read_text().split("\n")
    newer = lines[1].replace('"version": 1', '"version": 2')
    journal.write_text("\n".join(["[]", "{}", "\0", newer, *lines[2:]])[:-200])
    assert job.fill() == []
    assert len(job.stored()) == 4
    kept = journal.stat().st_size
    assert job.fill() == []
    assert journal.stat().st_size == kept, "every file is known again"


def test_a_kill_at_any_fault_point_is_repaired_by_a_rerun(job: Job) -> None:
    """Prompts are there already: kills while they are encoded are as with raw clips."""
    samples = job.samples(5)
    write_new(job.given, samples, samples_per_file=2)
    recipe, shards = job.world.load(), job.world.shards

    def begin_anew() -> None:
        for path in shards.iterdir():
            if path.stem not in ("validation", "hashes"):
                path.unlink()

    job.fill()
    begin_anew()
    faults = job.world.root / "faults.log"
    assert in_fork(lambda: preprocess(recipe), fault_log=faults) == 0
    expected = digests(shards, *RESULTS)
    assert len([name for name in expected if name.startswith("shard-")]) == 4
    points = passes(faults)
    assert {"listed:1", "listed:3", "plan.write:1", "shard.parquet.rename:2"} <= set(points)
    for point in points:
        begin_anew()
        assert in_fork(lambda: preprocess(recipe), fault=point) == KILLED, point
        assert in_fork(lambda: preprocess(recipe)) == 0
        assert digests(shards, *RESULTS) == expected, point
        assert not list(shards.glob(".*.tmp")), point
    assert job.stored().keys() == {sample.id for sample in samples}


# ---------------------------------------------------------------- the verbs


def test_the_commands_speak_of_rows_as_of_clips(job: Job) -> None:
    job.write([*job.samples(3), *job.samples(1, seed=1, latent=(16, 2, 4, 6), id="a\tb")])
    done = fastvideo("preprocess", job.world, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["clips"] == {"encoded": 3, "filtered": 1}
    done = fastvideo("status", job.world, "--clips")
    assert done.code == 0, done.err
    head, *lines = done.out.splitlines()
    assert head.split("\t")[1] == "state"
    assert [line.split("\t")[1:3] for line in lines] == [
        ["encoded", ""],
        ["encoded", ""],
        ["encoded", ""],
        ["filtered", "too_short"],
    ]
    assert r"a\tb" in lines[3]
    done = fastvideo("train", job.world)
    assert done.code == 0, done.err
    counts = status.summary(job.world.load())
    assert counts["shards"] == {"total": 1, "done": 1, "missing": []}
    assert counts["train"]["transformer"]["step"] == 3
    assert fastvideo("train", job.world).err.count("already trained") == 1


def test_a_folder_that_is_none_of_upstreams_is_refused(job: Job) -> None:
    done = fastvideo("preprocess", job.world)
    assert done.code == 2
    assert "given: is no folder" in done.err
    (job.given / "rows").mkdir(parents=True)
    assert "holds no *.parquet" in fastvideo("preprocess", job.world).err
    (job.given / "rows/a.parquet").write_bytes(b"PAR1 and no more")
    assert "is not a whole Parquet file" in fastvideo("preprocess", job.world).err


def test_clips_are_read_in_the_order_of_the_shard_whatever_that_of_the_file(job: Job) -> None:
    samples = job.samples(6)
    job.write(samples[:3], "a.parquet")
    job.write(samples[3:], "b.parquet")
    job.fill(manifest_only=True)
    rows = read_rows(ShardStore(job.world.shards))
    order = [2, 0, 1, 5, 3, 4]
    found = adopted(
        job.world.load(), [rows[i] for i in order], columns=("vae_latent", "text_embedding")
    )
    for index, clip in zip(order, found, strict=True):
        given = torch.from_numpy(samples[index].tensors["vae_latent"])
        assert same(clip.tensors["vae_latent"], given)
