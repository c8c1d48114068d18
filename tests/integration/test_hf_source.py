# SPDX-License-Identifier: Apache-2.0
"""Clips in the rows of data files: hostile ones, nothing twice, killed anywhere, bounded memory."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fastvideo.config.recipe import Recipe
from fastvideo.config.source import HfSource
from fastvideo.data import examine
from fastvideo.data.decode import VideoInfo, probe
from fastvideo.data.footage import Content, Origin
from fastvideo.data.judge import ClipRow
from fastvideo.data.listing import list_clips, open_footage
from fastvideo.data.loader import Samples
from fastvideo.data.manifest import plan_manifest, read_rows
from fastvideo.errors import UserError
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore, ledger
from tests.hf_sets import VIDEO, clip_bytes, embedded, write_clips, write_rows, write_tar
from tests.tiny_world import World, digests, in_fork, make_world, passes

KILLED = -9
PART = "data/train-0000{}-of-0000{}.parquet"


@dataclass(frozen=True)
class Set:
    """A data set of Parquet files and the shards made of it."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "set"

    @property
    def store(self) -> ShardStore:
        return ShardStore(self.root / "shards")

    def recipe(self, **source: Any) -> Recipe:
        """Two clips to a shard."""
        tree = {
            "model": {"family": "wan2.1", "path": "none"},
            "clip": {"num_frames": 5, "height": 48, "width": 64, "fps": 10},
            "source": {"kind": "hf", "path": str(self.folder), **source},
            "shards": {"path": str(self.store.root), "rows": 2},
            "run_dir": str(self.root / "run"),
            "preprocess": {"decode_workers": 0},
        }
        return Recipe.parse(tree, origin="test")

    def write(self, *parts: list[tuple[Any, Any]]) -> None:
        """Write pairs of video and caption, a file for each list; earlier files go."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for number, pairs in enumerate(parts):
            videos, captions = zip(*pairs, strict=True)
            file = self.folder / PART.format(number, len(parts))
            write_rows(file, videos, captions, features=True)

    def plan(self, **source: Any) -> dict[str, Any]:
        return plan_manifest(self.recipe(**source), store=self.store, settings={})

    def rows(self) -> list[ClipRow]:
        return read_rows(self.store)

    def places(self) -> dict[str, tuple[int | None, int | None]]:
        return {row.id: (row.shard, row.row) for row in self.rows()}


@pytest.fixture
def small(tmp_path: Path) -> Set:
    return Set(tmp_path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """Six videos with captions."""
    names = [f"{index}.mp4" for index in range(6)]
    videos = embedded(tmp_path_factory.mktemp("clips"), *names)
    return [(video, f"caption {index}") for index, video in enumerate(videos)]


# ---------------------------------------------------------------- hostile rows


def test_each_hostile_row_ends_in_one_state_with_its_reason(small: Set, tmp_path: Path) -> None:
    write_clips(small.root / "outside", "secret.mp4", first=90)
    good = [clip_bytes(tmp_path, number) for number in range(12)]

    def video(data: bytes | None, path: str | None = None) -> dict[str, Any]:
        return {"bytes": data, "path": path}

    cases: list[tuple[Any, Any, tuple[str, str]]] = [
        (video(good[0], "a.mp4"), ["fine"], ("accepted", "")),
        (video(None, None), ["a"], ("failed", "no_video")),
        (None, ["a"], ("failed", "no_video")),
        (video(None, ""), ["a"], ("failed", "no_video")),
        (video(b"", "empty.mp4"), ["a"], ("failed", "empty_file")),
        (video(b"just words" * 99, "text.mp4"), ["a"], ("failed", "not_a_video")),
        (video(good[1][:200], "cut.mp4"), ["a"], ("failed", "corrupt")),
        (video(good[0], "twin.mp4"), ["a"], ("filtered", "duplicate_content")),
        (video(good[2], "a.mp4"), ["same name"], ("accepted", "")),
        (video(good[3], None), ["no name"], ("accepted", "")),
        (video(good[4], "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace")),
         ["odd name"], ("accepted", "")),
        (video(good[5], "../../etc/passwd"), ["a name only"], ("accepted", "")),
        (video(good[6], "b.mp4"), None, ("filtered", "no_caption")),
        (video(good[6], "b.mp4"), [], ("filtered", "no_caption")),
        (video(good[6], "b.mp4"), ["", " "], ("filtered", "no_caption")),
        (video(good[6], "b.mp4"), ["", "kept"], ("accepted", "")),
        (video(None, "/etc/passwd"), ["a"], ("failed", "outside_root")),
        (video(None, "../../outside/secret.mp4"), ["a"], ("failed", "outside_root")),
        (video(None, "gone.mp4"), ["a"], ("failed", "missing_file")),
        (video(None, "."), ["a"], ("failed", "not_a_file")),
        (video(None, "zero\0.mp4"), ["a"], ("failed", "bad_item")),
        (video(None, "clips/a.mp4"), ["a file beside"], ("accepted", "")),
        (video(None, "clips/a.mp4"), ["again"], ("filtered", "duplicate_path")),
        (video(None, "../clips/b.mp4"), ["a file of the set"], ("accepted", "")),
        (video(good[7], "last.mp4"), ["fine"], ("accepted", "")),
    ]  # fmt: skip
    small.write([(case[0], case[1]) for case in cases])
    write_clips(small.folder / "data/clips", "a.mp4", first=70)
    write_clips(small.folder / "clips", "b.mp4", first=80)
    (small.folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"
    )
    plan = small.plan(max_failed=1.0)
    rows = small.rows()
    assert [(row.state, row.reason) for row in rows] == [case[2] for case in cases]
    assert all(bool(row.detail) == (row.state != "accepted") for row in rows)
    assert [row.item for row in ledger(small.store, plan)] == list(range(len(cases)))
    by_row = {row.data_row: row.detail for row in rows if row.data_file}
    assert by_row[6].startswith("data/train-00000-of-00001.parquet#6: the container cannot be read")
    before = small.store.manifest.read_bytes()
    assert small.plan(max_failed=1.0) == plan
    assert small.store.manifest.read_bytes() == before
    used = [row for row in rows if row.state == "accepted"]
    assert len({row.id for row in used}) == len(used) and all(row.id for row in rows)
    contents = list(open_footage(small.recipe().source).read(row.origin for row in used))  # type: ignore[arg-type]
    assert [content_of(c) == good[0] for c in contents] == [True] + [False] * (len(used) - 1)


def content_of(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def test_a_caption_that_is_no_text_is_failed_by_itself(small: Set, tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", None], pa.binary()).view(pa.string())
    videos = embedded(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    table = pa.table({"video": pa.array(videos, VIDEO), "caption": raw})
    small.folder.mkdir()
    pq.write_table(table, small.folder / "r.parquet")
    small.plan(max_failed=1.0)
    assert [row.reason for row in small.rows()] == ["", "bad_item", "no_caption"]


def test_files_that_do_not_count_what_they_lack_are_listed_all_the_same(
    small: Set, pairs: list[tuple[Any, Any]]
) -> None:
    """Without statistics, or with some rows that hold bytes, only reading can tell."""
    videos = [video for video, _ in pairs]
    small.folder.mkdir()
    write_clips(small.folder, "x.mp4", first=50)
    videos[2] = {"bytes": None, "path": "x.mp4"}
    write_rows(small.folder / "a.parquet", videos[:4], list("abcd"), row_group_size=2)
    write_rows(small.folder / "b.parquet", videos[4:], list("ef"), write_statistics=False)
    items, _ = list_clips(HfSource(path=str(small.folder)))
    assert [str(item.origin) for item in items] == [
        "a.parquet#0", "a.parquet#1", "x.mp4", "a.parquet#3", "b.parquet#0", "b.parquet#1",
    ]  # fmt: skip


def test_members_of_a_tar_that_come_again_are_rows_of_their_own(
    small: Set, pairs: list[tuple[Any, Any]]
) -> None:
    one, two = (video["bytes"] for video, _ in pairs[:2])
    members = [("x.mp4", one), ("x.txt", b"one"), ("x.MP4", two), ("x.txt", b"two"), (".y", b"")]
    write_tar(small.folder / "a.tar", [*members, ("z.txt", b"no video"), ("dir/x.mp4", one)])
    items, footage = list_clips(HfSource(path=str(small.folder)))
    assert [(item.captions, item.problem and item.problem[1]) for item in items] == [
        (("one",), None), (("two",), None), (("no video",), "no_video"), ((), "no_caption"),
    ]  # fmt: skip
    assert list(footage.read(item.origin for item in items[:2] if item.origin)) == [one, two]


def test_columns_of_arrows_newer_types_are_read(small: Set, pairs: list[tuple[Any, Any]]) -> None:
    data = [pairs[0][0]["bytes"], None]
    words = pa.array(["a", "b"], pa.string_view())
    table = pa.table({"video": pa.array(data, pa.binary_view()), "caption": words})
    small.folder.mkdir()
    pq.write_table(table, small.folder / "r.parquet")
    items, footage = list_clips(HfSource(path=str(small.folder)))
    assert [(item.captions, item.problem and item.problem[1]) for item in items] == [
        (("a",), None), (("b",), "no_video"),
    ]  # fmt: skip
    assert list(footage.read(item.origin for item in items if item.origin)) == data[:1]


# ---------------------------------------------------------------- nothing twice


def test_nothing_is_read_or_written_when_nothing_changed(
    small: Set, pairs: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write(pairs[:3], pairs[3:])
    plan = small.plan()
    stamps = {path: path.stat().st_mtime_ns for path in small.store.root.iterdir()}
    monkeypatch.setattr("fastvideo.data.hf.footage.DatasetFootage.read", None)
    assert small.plan() == plan
    assert {path: path.stat().st_mtime_ns for path in small.store.root.iterdir()} == stamps


def test_rows_that_are_added_keep_ids_and_shards_and_are_probed_alone(
    small: Set, pairs: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless = [({**video, "path": None}, caption) for video, caption in pairs]
    for old in (pairs, nameless):
        shutil.rmtree(small.store.root, ignore_errors=True)
        small.write(old[:3])
        before, places = small.plan()["shards"], small.places()
        probed = watched_probes(monkeypatch)
        # As pushing to the Hub does: other files, other places in them, new rows at the end.
        small.write(old[:1], old[1:2], old[2:5])
        after = small.plan()["shards"]
        monkeypatch.undo()
        assert {index: after[index] for index in before} == before
        assert {name: small.places()[name] for name in places} == places
        assert [len(content) for content in probed] == [len(v["bytes"]) for v, _ in old[3:5]]


def test_the_order_of_rows_decides_no_id_of_clips_that_share_a_name(
    small: Set, pairs: list[tuple[Any, Any]]
) -> None:
    same = [({**video, "path": "a.mp4"}, caption) for video, caption in pairs[:3]]
    small.write([*same, *pairs[3:]])
    before, places = small.plan()["shards"], small.places()
    digests = [hashlib.sha256(video["bytes"]).hexdigest()[:16] for video, _ in same]
    assert list(places) == [*(f"a.mp4#{digest}" for digest in digests), "3.mp4", "4.mp4", "5.mp4"]
    small.write(pairs[5:], [*pairs[3:5], *same[::-1]])
    assert {index: small.plan()["shards"][index] for index in before} == before
    assert small.places() == places


def test_a_row_and_a_file_of_one_name_keep_their_places(
    small: Set, pairs: list[tuple[Any, Any]]
) -> None:
    videos = [{**pairs[0][0], "path": "a.mp4"}, pairs[1][0], {"bytes": None, "path": "a.mp4"}]
    write_clips(small.folder, "a.mp4", first=50)
    write_rows(small.folder / "r.parquet", videos, ["a", "b", "c"])
    (small.folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: r.parquet\n---\n"
    )
    plan, places = small.plan(), small.places()
    assert set(places.values()) == {(0, 0), (0, 1), (1, 0)}
    before = small.store.manifest.read_bytes()
    assert (small.plan(), small.places()) == (plan, places)
    assert small.store.manifest.read_bytes() == before


def watched_probes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is probed from here on."""
    probed: list[Any] = []

    def watched(video: Content) -> VideoInfo:
        probed.append(video)
        return probe(video)

    monkeypatch.setattr(examine, "probe", watched)
    return probed


def test_other_content_or_captions_change_only_their_shard(
    small: Set, pairs: list[tuple[Any, Any]], tmp_path: Path
) -> None:
    small.write(pairs)
    before = small.plan()["shards"]
    changed = [*pairs]
    changed[2] = ({"bytes": clip_bytes(tmp_path, 60), "path": "2.mp4"}, pairs[2][1])
    changed[5] = (pairs[5][0], "another")
    small.write(changed)
    after = small.plan()["shards"]
    assert [before[index] == after[index] for index in "012"] == [True, False, False]


# ---------------------------------------------------------------- kills


def test_a_kill_while_probing_loses_no_probe(small: Set, pairs: list[tuple[Any, Any]]) -> None:
    small.write(pairs)
    assert in_fork(small.plan, fault="probe:4") == KILLED
    trace = small.root / "faults.log"
    assert in_fork(small.plan, fault_log=trace) == 0
    assert [point for point in passes(trace) if point.startswith("probe")] == ["probe:1", "probe:2"]


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path, pairs: list[tuple[Any, Any]]) -> World:
    """A whole job on Parquet."""
    world = make_world(tmp_path, clips=0, model=tiny_model)
    small = Set(tmp_path)
    small.write(pairs[:3], pairs[3:])
    tree = yaml.safe_load(world.recipe.read_text())
    tree["source"] = {"kind": "hf", "path": str(small.folder)}
    tree["clip"].update(num_frames=5, fps=10)
    world.recipe.write_text(yaml.safe_dump(tree))
    return world


def test_shards_are_those_of_the_same_clips_as_files(
    world: World, pairs: list[tuple[Any, Any]], tmp_path: Path
) -> None:
    assert preprocess(world.load())["filled"] == [0, 1]
    rows = digests(world.shards, "shard-*.parquet")
    shutil.rmtree(world.shards)
    videos = world.root / "clips/videos"
    for video, _ in pairs:
        (videos / video["path"]).write_bytes(video["bytes"])
    world.write_items([{"path": video["path"], "cap": caption} for video, caption in pairs])
    merged = ("source.kind=merged", f"source.path={world.root / 'clips'}")
    assert preprocess(world.load(*merged))["filled"] == [0, 1]
    assert digests(world.shards, "shard-*.parquet") == rows


def test_kills_while_filling_are_repaired_and_nothing_is_encoded_twice(world: World) -> None:
    trace = world.root / "faults.log"
    assert in_fork(lambda: preprocess(world.load()), fault_log=trace) == 0
    patterns = ("shard-*", "manifest.*", "clips.jsonl")
    expected = digests(world.shards, *patterns)
    points = [p for p in passes(trace) if p.split(".")[0].split(":")[0] in ("shard", "probe")]
    for point in points[::6]:
        shutil.rmtree(world.shards)
        assert in_fork(lambda: preprocess(world.load()), fault=point) == KILLED, point
        assert in_fork(lambda: preprocess(world.load())) == 0
        assert digests(world.shards, *patterns) == expected, point
    assert preprocess(world.load())["filled"] == []
    (world.shards / "shard-00001.json").unlink()
    assert preprocess(world.load("preprocess.decode_workers=1"))["filled"] == [1]
    assert digests(world.shards, *patterns) == expected
    samples = Samples(ShardStore(world.shards), split="train", columns=())
    assert len(samples) == 6


def test_a_row_that_changed_after_planning_is_not_encoded_under_the_old_name(
    world: World, pairs: list[tuple[Any, Any]]
) -> None:
    preprocess(world.load(), manifest_only=True)
    Set(world.root).write(pairs[1:4], pairs[3:])
    with pytest.raises(UserError, match=r"parquet#0: changed since the manifest was planned"):
        preprocess(world.load(), shards=[0])
    Set(world.root).write(pairs[:1], pairs[3:])
    with pytest.raises(UserError, match=r"parquet: row 1 is gone since the manifest was planned"):
        preprocess(world.load(), shards=[0])


# ---------------------------------------------------------------- reading


def test_rows_come_in_the_order_they_are_asked_for(
    small: Set, pairs: list[tuple[Any, Any]]
) -> None:
    small.write(pairs[:4], pairs[4:])
    first, second = (f"data/train-0000{number}-of-00002.parquet" for number in range(2))
    asked = [(first, 3), (second, 1), (second, 0), (first, 0), (first, 2), (first, 2), (first, 1)]
    footage = open_footage(HfSource(path=str(small.folder)))
    contents = list(footage.read(Origin(*place) for place in asked))
    places = [row if file == first else 4 + row for file, row in asked]
    assert contents == [pairs[place][0]["bytes"] for place in places]


def test_many_rows_are_probed_by_workers(small: Set, tmp_path: Path) -> None:
    data = clip_bytes(tmp_path, 0)
    videos = [data + b"\0\0\0\x0cfree%04d" % number for number in range(30)]
    videos[7] = b"no video"
    small.write([({"bytes": video, "path": None}, "a") for video in videos])
    recipe = small.recipe()
    parallel = recipe.preprocess.model_copy(update={"decode_workers": 2})
    recipe = recipe.model_copy(update={"preprocess": parallel})
    plan_manifest(recipe, store=small.store, settings={})
    rows = small.rows()
    assert [row.data_row for row in rows if row.state != "accepted"] == [7]
    assert [row.sha256 for row in rows] == [hashlib.sha256(video).hexdigest() for video in videos]


# ---------------------------------------------------------------- memory


def test_a_row_group_that_is_larger_than_memory_is_read_row_by_row(tmp_path: Path) -> None:
    """32 videos of 2 MiB in one row group; a page holds one of them."""
    size, count = 2 << 20, 32
    (tmp_path / "set").mkdir()
    code = (
        "import os, sys, pyarrow as pa, pyarrow.parquet as pq\n"
        "kind = pa.struct({'bytes': pa.binary(), 'path': pa.string()})\n"
        "size, count = map(int, sys.argv[2:])\n"
        "videos = [{'bytes': os.urandom(size), 'path': f'{i}'} for i in range(count)]\n"
        "table = pa.table({'video': pa.array(videos, kind), 'caption': ['a'] * len(videos)})\n"
        "pq.write_table(table, sys.argv[1], write_batch_size=1, use_dictionary=False)\n"
    )
    file = tmp_path / "set/r.parquet"
    subprocess.run([sys.executable, "-c", code, file, str(size), str(count)], check=True)
    job = (
        "import resource, sys\n"
        "from fastvideo.config.source import HfSource\n"
        "from fastvideo.data.listing import list_clips\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "items, footage = list_clips(HfSource(path=sys.argv[1]))\n"
        "first = next(footage.read([items[0].origin]))\n"
        "before = peak()\n"
        "sizes = {len(c) for c in footage.read(item.origin for item in items[1::2])}\n"
        "print(peak() - before, len(first), sizes == {len(first)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", job, file.parent],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    kib, length, same = done.stdout.split()
    assert (int(length), same) == (size, "True")
    assert int(kib) * 1024 < size * count / 4
