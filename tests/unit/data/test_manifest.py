# SPDX-License-Identifier: Apache-2.0
"""The manifest: one row per item, shards that stay, and no work done twice, even after a kill."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastvideo import log
from fastvideo.config.recipe import Recipe
from fastvideo.data import examine
from fastvideo.data.judge import ClipRow, seeded_split
from fastvideo.data.manifest import plan_manifest, read_rows
from fastvideo.errors import UserError
from fastvideo.hashing import fingerprint
from fastvideo.state import ShardStore, ledger
from tests.media import Encoding, write_numbered
from tests.tiny_world import in_fork, passes

SETTINGS = {"clip": {"num_frames": 5, "fps": 10.0}, "decode": {"version": 1}}
KILLED = -9


@dataclass
class Plans:
    """A data set and where its plans go."""

    root: Path

    def recipe(self, **filters: Any) -> Recipe:
        """Small clips, two to a shard."""
        source = {"kind": "merged", "path": str(self.root / "data"), **filters.pop("source", {})}
        source["filters"] = filters
        return Recipe.parse(
            {
                "model": {"family": "wan2.1", "path": "none"},
                "clip": {"num_frames": 5, "height": 32, "width": 48, "fps": 10},
                "source": source,
                "shards": {"path": str(self.root / "shards"), "rows": 2},
                "run_dir": str(self.root / "run"),
                "preprocess": {"decode_workers": 0},
            },
            origin="test",
        )

    @property
    def store(self) -> ShardStore:
        return ShardStore(self.root / "shards")

    def video(self, name: str, *, frames: int = 10, fps: int = 10, height: int = 48) -> None:
        """Write a video of its own content; the number of its name decides the length."""
        path = self.root / "data/videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_numbered(path, frames, Encoding(fps=fps, codec="mpeg4"), height=height)
        with path.open("ab") as file:  # an atom that players skip
            file.write(b"\0\0\0\x40free" + name.encode()[:56].ljust(56))

    def clips(self, *names: str) -> None:
        """Write videos that are not there and list exactly these."""
        for name in names:
            if not (self.root / "data/videos" / name).exists():
                self.video(name)
        self.items(*({"path": name, "cap": f"caption of {name}"} for name in names))

    def items(self, *items: Any) -> None:
        (self.root / "data/videos").mkdir(parents=True, exist_ok=True)
        (self.root / "data/videos2caption.json").write_text(json.dumps(items))

    def plan(self, *, settings: dict[str, Any] = SETTINGS, **filters: Any) -> dict[str, Any]:
        return plan_manifest(self.recipe(**filters), store=self.store, settings=settings)

    def rows(self) -> dict[str, ClipRow]:
        return {row.id: row for row in read_rows(self.store)}

    def places(self) -> dict[str, tuple[int | None, int | None]]:
        return {row.id: (row.shard, row.row) for row in read_rows(self.store)}


@pytest.fixture
def plans(tmp_path: Path) -> Plans:
    return Plans(tmp_path)


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(log.logger, "propagate", False)
    log.logger.addHandler(caplog.handler)
    log.logger.setLevel(logging.INFO)
    yield caplog
    log.logger.removeHandler(caplog.handler)


def messages(said: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in said.records]
    said.clear()
    return [text for text in found if not text.startswith("probe")]


# ---------------------------------------------------------------- content


def test_a_row_holds_what_the_file_holds(plans: Plans) -> None:
    plans.video("sub/a.mp4", frames=12, fps=12)
    plans.items({"path": "./sub/a.mp4", "cap": ["one", "two"], "split": "heldout"})
    plan = plans.plan()
    (row,) = read_rows(plans.store)
    file = plans.root / "data/videos/sub/a.mp4"
    assert (row.item, row.id, row.path) == (0, "./sub/a.mp4", "sub/a.mp4")
    assert (row.captions, row.split, row.state) == (("one", "two"), "heldout", "accepted")
    assert (row.width, row.height, row.fps, row.num_frames) == (64, 48, 12.0, 12)
    assert (row.duration_s, row.rotation, row.codec) == (1.0, 0, "mpeg4")
    assert (row.bytes, row.mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
    clips = [["./sub/a.mp4", row.sha256, ["one", "two"]]]
    assert plan["shards"] == {
        "0": {"rows": 1, "fingerprint": fingerprint({"settings": SETTINGS, "clips": clips})}
    }
    assert plan == plans.store.read_plan()


def test_the_ledger_reads_every_item_in_order(plans: Plans) -> None:
    plans.clips("a.mp4", "b.mp4")
    plans.items(
        {"path": "a.mp4", "cap": "a"}, "nonsense", {"path": "b.mp4", "cap": ""}, {"path": "c.mp4"}
    )
    rows = list(ledger(plans.store, plans.plan()))
    assert [row.item for row in rows] == [0, 1, 2, 3]
    assert [(row.id, row.state, row.reason) for row in rows] == [
        ("a.mp4", "pending", ""),
        ("", "failed", "bad_item"),
        ("b.mp4", "filtered", "no_caption"),
        ("c.mp4", "failed", "bad_item"),
    ]
    assert [row.split for row in rows] == ["train", "", "train", "train"]


# Limits that the clip misses and meets exactly: 10 frames, 10 fps, 64x48, 16 characters.
FILTERS: dict[str, tuple[Any, Any, str]] = {
    "min_duration_s": (1.01, 1.0, "too_short"),
    "max_duration_s": (0.99, 1.0, "too_long"),
    "min_fps": (10.1, 10.0, "low_fps"),
    "max_fps": (9.9, 10.0, "high_fps"),
    "min_frames": (11, 10, "few_frames"),
    "min_height": (49, 48, "too_small"),
    "min_width": (65, 64, "too_small"),
    "min_caption_chars": (17, 16, "caption_too_short"),
    "max_caption_chars": (15, 16, "caption_too_long"),
}


@pytest.mark.parametrize("key", FILTERS)
def test_each_filter_gives_its_reason_and_names_its_key(plans: Plans, key: str) -> None:
    missed, met, reason = FILTERS[key]
    plans.clips("a.mp4")
    plans.plan(**{key: missed})
    (row,) = read_rows(plans.store)
    assert (row.state, row.reason, row.shard) == ("filtered", reason, None)
    assert f"source.filters.{key}={missed}" in row.detail
    plans.plan(**{key: met})
    assert read_rows(plans.store)[0].state == "accepted"


def test_captions_of_a_wrong_length_are_left_out_beside_others(plans: Plans) -> None:
    plans.video("a.mp4")
    plans.items({"path": "a.mp4", "cap": ["abc", "  ab  ", "abcdef"]})
    plans.plan(min_caption_chars=3, max_caption_chars=5)
    assert read_rows(plans.store)[0].captions == ("abc",)


@pytest.mark.parametrize(("frames", "state"), [(4, "filtered"), (5, "accepted")])
def test_a_clip_must_reach_to_the_last_wanted_frame(plans: Plans, frames: int, state: str) -> None:
    plans.video("a.mp4", frames=frames)
    plans.items({"path": "a.mp4", "cap": "a"})
    plans.plan()
    row = read_rows(plans.store)[0]
    assert (row.state, row.reason) == (state, "" if state == "accepted" else "too_short")


def test_the_same_content_is_used_once_unless_allowed(plans: Plans) -> None:
    plans.clips("a.mp4")
    for name in ("b.mp4", "c.mp4"):
        (plans.root / "data/videos" / name).write_bytes(
            (plans.root / "data/videos/a.mp4").read_bytes()
        )
    plans.items(*({"path": f"{name}.mp4", "cap": "a"} for name in "abc"))
    plans.plan()
    assert [row.reason for row in read_rows(plans.store)] == ["", *["duplicate_content"] * 2]
    assert "'a.mp4'" in plans.rows()["c.mp4"].detail
    plans.plan(allow_duplicates=True)
    assert {row.state for row in read_rows(plans.store)} == {"accepted"}


def test_the_same_content_is_in_one_split_unless_an_item_says_another(plans: Plans) -> None:
    names = [f"{number}.mp4" for number in range(8)]
    plans.clips("0.mp4")
    for name in names[1:]:
        shutil.copyfile(plans.root / "data/videos/0.mp4", plans.root / "data/videos" / name)
    source = {"heldout": 0.5}
    plans.items(*({"path": name, "cap": "a"} for name in names))
    plans.plan(source=source, allow_duplicates=True)
    spec = plans.recipe(source=source).source
    assert len({seeded_split(name, source=spec) for name in names}) == 2, "they would be apart"
    first = seeded_split("0.mp4", source=spec)
    assert {row.split for row in read_rows(plans.store)} == {first}
    other = "train" if first == "heldout" else "heldout"
    splits = [{}, {}, {"split": other}, {}, {"split": first}, *[{}] * 3]
    items = ({"path": name, "cap": "a", **s} for name, s in zip(names, splits, strict=True))
    plans.items(*items)
    plans.plan(source=source, allow_duplicates=True)
    expected = [first if index == 4 else other for index in range(8)]
    assert [row.split for row in read_rows(plans.store)] == expected


def test_a_seeded_share_is_held_out_and_stays_when_clips_are_added() -> None:
    def split(count: int, **source: Any) -> list[str]:
        spec = Plans(Path("unused")).recipe(source=source).source
        return [seeded_split(f"{i}.mp4", source=spec) for i in range(count)]

    few, many = split(100, heldout=0.2), split(2000, heldout=0.2)
    assert many[:100] == few
    assert Counter(many)["heldout"] == pytest.approx(400, abs=60)
    assert split(2000, heldout=0.2, heldout_seed=1) != many
    assert set(split(50)) == {"train"}
    assert set(split(50, heldout=1.0)) == {"heldout"}


# ---------------------------------------------------------------- shards


def test_new_clips_make_new_shards_and_old_ones_stay(plans: Plans) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    before = plans.plan()["shards"]
    plans.clips("z.mp4", "c.mp4", "b.mp4", "a.mp4", "d.mp4", "e.mp4")
    after = plans.plan()["shards"]
    assert plans.places() == {
        "a.mp4": (0, 0),
        "b.mp4": (0, 1),
        "c.mp4": (1, 0),
        "z.mp4": (2, 0),
        "d.mp4": (2, 1),
        "e.mp4": (3, 0),
    }
    assert {index: after[index] for index in before} == before


def test_a_removed_clip_closes_the_gap_and_its_place_is_not_used_again(plans: Plans) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    before = plans.plan()["shards"]
    plans.clips("b.mp4")
    after = plans.plan()["shards"]
    assert plans.places() == {"b.mp4": (0, 0)}
    assert list(after) == ["0"] and after["0"] != before["0"]
    plans.clips("b.mp4", "c.mp4")
    plans.plan()
    assert plans.places() == {"b.mp4": (0, 0), "c.mp4": (2, 0)}
    assert [row.id for row in read_rows(plans.store, 2)] == ["c.mp4"]
    assert read_rows(plans.store, 1) == []


def test_other_content_or_captions_change_the_shard_in_place(plans: Plans) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    before = plans.plan()["shards"]
    plans.video("a.mp4", frames=11)
    content = plans.plan()["shards"]
    assert content["0"] != before["0"] and content["1"] == before["1"]
    plans.items(*({"path": f"{name}.mp4", "cap": "new"} for name in "abc"))
    captions = plans.plan()["shards"]
    assert captions["0"] != content["0"] and captions["1"] != content["1"]
    assert plans.places() == {"a.mp4": (0, 0), "b.mp4": (0, 1), "c.mp4": (1, 0)}


def test_splits_and_the_size_of_shards_encode_nothing_again(plans: Plans) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    before = plans.plan()["shards"]
    recipe = plans.recipe(source={"heldout": 1.0})
    bigger = recipe.model_copy(update={"shards": recipe.shards.model_copy(update={"rows": 64})})
    assert plan_manifest(bigger, store=plans.store, settings=SETTINGS)["shards"] == before
    assert {row.split for row in read_rows(plans.store)} == {"heldout"}


def test_the_log_says_what_is_encoded_again_and_why(
    plans: Plans, said: pytest.LogCaptureFixture
) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    plans.plan()
    assert messages(said) == ["3 items: 3 accepted; 2 shards"]
    plans.plan()
    assert messages(said) == ["3 items: 3 accepted; 2 shards"]
    other = {"clip": {"num_frames": 9, "fps": 10.0}, "decode": {"version": 1}, "dtype": "float16"}
    plans.plan(settings=other)
    assert messages(said)[1:] == [
        "2 of 2 shards are to be encoded again: settings changed: "
        "clip.num_frames: 5 -> 9; dtype: none -> float16"
    ]
    plans.video("b.mp4", frames=11)
    plans.items(
        {"path": "b.mp4", "cap": "new"}, *({"path": f"{n}.mp4", "cap": "new"} for n in "cde")
    )
    plans.video("d.mp4")
    plans.plan(settings=other)
    assert messages(said) == [
        "4 items: 3 accepted, 1 failed (missing_file 1); 3 shards",
        "2 of 3 shards are to be encoded again: 1 clip removed, 2 clips with other captions, "
        "1 clip with other content",
        "1 clip added in 1 new shard",
    ]


# ---------------------------------------------------------------- nothing twice


def test_nothing_is_written_or_read_when_nothing_changed(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.clips("a.mp4", "b.mp4")
    (plans.root / "data/videos/broken.mp4").write_bytes(b"no video")
    names = ("a.mp4", "b.mp4", "broken.mp4")
    plans.items(*({"path": name, "cap": "a"} for name in names))
    first = plans.plan()
    stamps = {path.name: path.stat().st_mtime_ns for path in plans.store.root.iterdir()}
    assert set(stamps) == {"manifest.parquet", "manifest.json", "clips.jsonl"}
    monkeypatch.setattr(examine, "examine_file", None)
    assert plans.plan() == first
    assert {path.name: path.stat().st_mtime_ns for path in plans.store.root.iterdir()} == stamps
    assert plans.rows()["broken.mp4"].reason == "not_a_video"


def test_a_repaired_file_is_looked_at_again(plans: Plans) -> None:
    plans.clips("a.mp4")
    (plans.root / "data/videos/a.mp4").write_bytes(b"no video")
    plans.plan()
    assert plans.rows()["a.mp4"].state == "failed"
    plans.video("a.mp4")
    plans.plan()
    assert plans.rows()["a.mp4"].state == "accepted"


def test_the_same_input_gives_the_same_bytes(plans: Plans, tmp_path: Path) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    plans.plan()
    names = ("manifest.parquet", "manifest.json", "clips.jsonl")
    first = {name: (plans.store.root / name).read_bytes() for name in names}
    for name in names:
        (plans.store.root / name).unlink()
    plans.plan()
    assert {name: (plans.store.root / name).read_bytes() for name in names} == first


def test_an_unreadable_old_manifest_is_planned_anew(
    plans: Plans, said: pytest.LogCaptureFixture
) -> None:
    plans.clips("a.mp4", "b.mp4")
    first = plans.plan()
    plans.store.manifest.write_bytes(b"PAR1 nonsense")
    assert plans.plan() == first
    assert "cannot be read and is planned anew" in said.text


def test_a_manifest_that_is_not_there_is_a_users_mistake(plans: Plans) -> None:
    with pytest.raises(UserError, match="--manifest-only"):
        read_rows(plans.store)


# ---------------------------------------------------------------- kills


def test_a_kill_between_any_two_writes_leaves_no_plan_that_does_not_fit(plans: Plans) -> None:
    plans.clips("a.mp4", "b.mp4", "c.mp4")
    plans.plan()
    names = ("manifest.parquet", "manifest.json", "clips.jsonl")
    old = {name: (plans.store.root / name).read_bytes() for name in names}
    # The same sizes and other content: only a missing plan tells them apart.
    plans.items(*({"path": f"{name}.mp4", "cap": f"CAPTION of {name}.mp4"} for name in "abc"))
    plans.video("c.mp4", frames=12)
    trace = plans.root / "faults.log"
    assert in_fork(plans.plan, fault_log=trace) == 0
    new = {name: (plans.store.root / name).read_bytes() for name in names}
    points = passes(trace)
    assert {point.partition(".")[0].partition(":")[0] for point in points} == {
        "probe",
        "plan",
        "manifest",
        "clips",
    }
    for point in points:
        for name, data in old.items():
            (plans.store.root / name).write_bytes(data)
        assert in_fork(plans.plan, fault=point) == KILLED
        found = {n: (plans.store.root / n).read_bytes() for n in names if has(plans, n)}
        assert found in (old, new) or plans.store.read_plan() is None, point
        assert in_fork(plans.plan) == 0
        assert {name: (plans.store.root / name).read_bytes() for name in names} == new, point
    assert sorted(path.name for path in plans.store.root.iterdir()) == sorted(names)


def has(plans: Plans, name: str) -> bool:
    return (plans.store.root / name).exists()


def test_a_kill_while_probing_loses_no_probe(plans: Plans) -> None:
    names = [f"{index}.mp4" for index in range(6)]
    plans.clips(*names)
    assert in_fork(plans.plan, fault="probe:4") == KILLED
    with plans.store.probes.open("a") as file:
        file.write('{"name": "4.mp4", "ver')  # what a cut write leaves
    trace = plans.root / "faults.log"
    assert in_fork(plans.plan, fault_log=trace) == 0
    assert [point for point in passes(trace) if point.startswith("probe")] == ["probe:1", "probe:2"]
    assert not plans.store.probes.exists()
    assert len(plans.store.read_plan() or {}) == 5
    assert {row.state for row in read_rows(plans.store)} == {"accepted"}


# ---------------------------------------------------------------- many


def test_many_files_are_probed_by_workers_in_order(plans: Plans) -> None:
    plans.clips("a.mp4")
    data = (plans.root / "data/videos/a.mp4").read_bytes()
    for index in range(40):
        (plans.root / f"data/videos/{index}.mp4").write_bytes(
            b"" if index == 7 else data + b"\0\0\0\x0cfree%04d" % index
        )
    plans.items(*({"path": f"{index}.mp4", "cap": "a"} for index in range(40)))
    code = (
        "import sys; from pathlib import Path; from fastvideo.config.recipe import Recipe\n"
        "from fastvideo.data.manifest import *; from fastvideo.state import ShardStore\n"
        "if __name__ == '__main__':\n"
        "    recipe = Recipe.load(Path(sys.argv[1]), ['preprocess.decode_workers=2'])\n"
        "    plan_manifest(recipe, store=ShardStore(recipe.shards.path), settings={})\n"
    )
    (plans.root / "recipe.yaml").write_text(plans.recipe().dump())
    (plans.root / "run.py").write_text(code)
    command = [sys.executable, str(plans.root / "run.py"), str(plans.root / "recipe.yaml")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    rows = read_rows(plans.store)
    assert [row.id for row in rows] == [f"{index}.mp4" for index in range(40)]
    assert [row.id for row in rows if row.state != "accepted"] == ["7.mp4"]
    assert rows[7].reason == "empty_file"


def test_planning_a_large_unchanged_data_set_again_is_quick(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.clips("a.mp4")
    known = examine.examine_file(plans.root / "data/videos/a.mp4")

    def examined(path: Path) -> examine.Examined:
        status = path.stat()
        return examine.Examined(status.st_size, status.st_mtime_ns, path.name, known.info, None)

    # Stands in for hours of reading; what is measured is everything else.
    monkeypatch.setattr(examine, "examine_file", examined)
    for index in range(5000):
        (plans.root / f"data/videos/{index}.mp4").touch()
    plans.items(*({"path": f"{index}.mp4", "cap": f"{index}"} for index in range(5000)))
    plan = plans.plan()
    begin_s = time.perf_counter()
    assert plans.plan() == plan
    assert (time.perf_counter() - begin_s) * 100_000 / 5000 < 60
