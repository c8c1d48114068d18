# SPDX-License-Identifier: Apache-2.0
"""A data set of hostile items: each ends in one state with one reason, and harms no neighbour."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvideo.config.recipe import Recipe
from fastvideo.data.decode import ClipFault, decode_clip
from fastvideo.data.judge import ClipRow
from fastvideo.data.manifest import plan_manifest, read_rows
from fastvideo.errors import UserError
from fastvideo.state import ShardStore, ledger
from tests.media import (
    CORNERS,
    Encoding,
    corners_of,
    flipped,
    noise,
    number_of,
    write_cover,
    write_numbered,
    write_sound,
    write_video,
)
from tests.media import numbered as numbered_image

CLIP = {"num_frames": 5, "height": 48, "width": 64, "fps": 10.0}
USED = ("accepted", "")
SECRET = "outside/secret.mp4"

Maker = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """An item, how its file is made, and what must become of it."""

    name: str
    make: Maker | None
    expected: tuple[str, str]
    """(state, reason) in the manifest."""
    item: Any = field(default_factory=dict)
    """Merged over path and caption, or the whole item if it is no object."""
    decodes: str = ""
    """Reason of the fault that decoding finds; empty for none."""


def numbered(encoding: Encoding | None = None, *, count: int = 8, **size: int) -> Maker:
    encoding = encoding or Encoding(fps=10)
    return lambda path: write_numbered(path, count, encoding, **size)


def as_kind(suffix: str, encoding: Encoding) -> Maker:
    """A file of another kind under the name of an mp4."""

    def make(path: Path) -> None:
        numbered(encoding)(path.with_suffix(suffix))
        path.with_suffix(suffix).rename(path)

    return make


def cut(share: float, **options: str) -> Maker:
    def make(path: Path) -> None:
        noise(path, options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make


def text(content: str | bytes) -> Maker:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def playlist(template: str) -> Maker:
    """A text that asks a player to open a file outside of the data set."""

    def make(path: Path) -> None:
        path.write_text(template.format(secret=path.parents[2] / SECRET))

    return make


def link(path: Path) -> None:
    path.symlink_to(path.parents[2] / SECRET)


def twin(path: Path) -> None:
    path.write_bytes((path.parent / "good0.mp4").read_bytes())


def bomb(path: Path) -> None:
    """A GIF that says it is 65535 pixels high and wide: 17 GB a frame."""
    numbered(Encoding(codec="gif", pixels="rgb8", fps=10))(path.with_suffix(".gif"))
    data = bytearray(path.with_suffix(".gif").read_bytes())
    data[6:10] = b"\xff" * 4
    path.write_bytes(data)


def ribbon(path: Path) -> None:
    image = np.zeros((16, 20000, 3), np.uint8)
    write_video(path, [image] * 6, Encoding(codec="ffv1", fps=10, container="matroska"))


def turned(degrees: int) -> Maker:
    """Stored as a phone stores it, with a note how to turn it."""

    def make(path: Path) -> None:
        images = [np.rot90(numbered_image(i), k=-degrees // 90) for i in range(8)]
        write_video(path, map(np.ascontiguousarray, images), Encoding(fps=10, rotation=degrees))

    return make


FAILED = "failed"
FILTERED = "filtered"
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n"
DASH = '<?xml version="1.0"?><MPD><Period><BaseURL>{secret}</BaseURL></Period></MPD>'

CASES = [
    # containers and codecs under a wrong name, odd shapes, odd times: all fine
    Case("matroska.mp4", as_kind(".mkv", Encoding(fps=10)), USED),
    Case("gif.mp4", as_kind(".gif", Encoding(codec="gif", pixels="rgb8", fps=10)), USED),
    Case("b_frames.avi", numbered(), USED),
    Case("variable_rate.mp4", numbered(Encoding(times=[0, 1, 2, 3, 5, 6, 8, 9], fps=10)), USED),
    Case("late_start.mp4", numbered(Encoding(times=range(90, 98), fps=10)), USED),
    Case("turned_90.mp4", turned(90), USED),
    Case("turned_180.mp4", turned(180), USED),
    Case("odd_size.mp4", numbered(Encoding(fps=10, pixels="yuv444p"), height=241, width=321), USED),
    Case("wide_pixels.mp4", numbered(Encoding(fps=10, aspect=Fraction(2)), width=32), USED),
    Case("sixty_fps.mp4", numbered(Encoding(fps=60), count=40), USED),
    # names
    Case("ünïcødé 日本 🎞.mp4", numbered(), USED),
    Case("two  spaces .mp4", numbered(), USED),
    Case("a\nnew line\t.mp4", numbered(), USED),
    Case('it\'s "quoted" `$(x)` \\ %03d *?.mp4', numbered(), USED),
    Case("-rf.mp4", numbered(), USED),
    Case("file:concat:a|b.mp4", numbered(), USED),
    Case(".hidden", numbered(Encoding(fps=10, container="mp4")), USED),
    Case("link.mp4", link, USED),
    Case("sub/folder/deep.mp4", numbered(), USED),
    Case("absolute", None, (FAILED, "outside_root"), {"path": "/etc/passwd"}),
    Case("up", None, (FAILED, "outside_root"), {"path": "../" + SECRET}),
    Case("up inside", None, (FAILED, "outside_root"), {"path": "x/../../" + SECRET}),
    Case("gone.mp4", None, (FAILED, "missing_file")),
    Case("name_of_300" + "x" * 300, None, (FAILED, "missing_file")),
    Case("folder.mp4", Path.mkdir, (FAILED, "not_a_file")),
    Case("pipe.mp4", os.mkfifo, (FAILED, "not_a_file")),
    Case("same path", None, (FILTERED, "duplicate_path"), {"path": "good0.mp4"}),
    Case("same path again", None, (FILTERED, "duplicate_path"), {"path": "sub/../good0.mp4"}),
    Case("same_content.mp4", twin, (FILTERED, "duplicate_content")),
    # files that are no usable video
    Case("empty.mp4", text(""), (FAILED, "empty_file")),
    Case("text.mp4", text("just some words\n" * 99), (FAILED, "not_a_video")),
    Case("zeros.mp4", text(bytes(5000)), (FAILED, "not_a_video")),
    Case("page.mp4", text("<!doctype html><title>404</title>"), (FAILED, "not_a_video")),
    Case("hls.mp4", playlist(HLS), (FAILED, "not_a_video")),
    Case("dash.mp4", playlist(DASH), (FAILED, "not_a_video")),
    Case(
        "ffconcat.mp4",
        playlist("ffconcat version 1.0\nfile '{secret}'\n"),
        (FAILED, "not_a_video"),
    ),
    Case("sound.mp4", write_sound, (FAILED, "no_video_stream")),
    Case("sound_with_cover.mp4", write_cover, (FAILED, "no_video_stream")),
    Case("index_lost.mp4", cut(0.7), (FAILED, "corrupt")),
    Case("index_kept.mp4", cut(0.7, movflags="faststart"), (FAILED, "corrupt")),
    Case("only_a_head.mp4", cut(0.001), (FAILED, "corrupt")),
    Case("flipped.mp4", flipped, USED, decodes="corrupt"),
    Case("ribbon.mkv", ribbon, (FAILED, "too_large")),
    Case("bomb.mp4", bomb, (FAILED, "corrupt")),
    Case("one_frame.mp4", numbered(count=1), (FILTERED, "too_short")),
    Case("four_frames.mp4", numbered(count=4), (FILTERED, "too_short")),
    # captions, keys and types
    Case("long.mp4", numbered(), USED, {"cap": "a" * 10_000}),
    Case("too_long.mp4", numbered(), (FILTERED, "caption_too_long"), {"cap": "a" * 10_001}),
    Case("null_cap.mp4", numbered(), (FILTERED, "no_caption"), {"cap": None}),
    Case("empty_cap.mp4", numbered(), (FILTERED, "no_caption"), {"cap": ""}),
    Case("no_caps.mp4", numbered(), (FILTERED, "no_caption"), {"cap": []}),
    Case("blank_cap.mp4", numbered(), (FILTERED, "no_caption"), {"cap": [" \n"]}),
    Case("object_cap.mp4", numbered(), (FAILED, "bad_item"), {"cap": {}}),
    Case("number_cap.mp4", numbered(), (FAILED, "bad_item"), {"cap": ["ok", 3]}),
    Case("half_character.mp4", numbered(), (FAILED, "bad_item"), {"cap": "\ud83d"}),
    Case("odd_cap.mp4", numbered(), USED, {"cap": ["tab\t zero\0 quote' \u2028 \U0001f600", ""]}),
    Case("split.mp4", numbered(), (FAILED, "bad_item"), {"split": "val"}),
    Case("held_out.mp4", numbered(), USED, {"split": "heldout"}),
    Case("number path", None, (FAILED, "bad_item"), {"path": 3}),
    Case("empty path", None, (FAILED, "bad_item"), {"path": ""}),
    Case("zero path", None, (FAILED, "bad_item"), {"path": "a\0b.mp4"}),
    Case("text item", None, (FAILED, "bad_item"), "a.mp4"),
    Case("null item", None, (FAILED, "bad_item"), None),
    Case("list item", None, (FAILED, "bad_item"), ["a.mp4", "a cat"]),
    Case("hints.mp4", numbered(), USED, {"fps": "?", "resolution": None, "duration": float("nan")}),
]


@dataclass(frozen=True)
class Planned:
    """The data set after planning, a good clip before and after each case."""

    recipe: Recipe
    store: ShardStore
    plan: dict[str, Any]
    rows: list[ClipRow]

    def decode(self, row: ClipRow) -> Any:
        return decode_clip(Path(self.recipe.source.path) / "videos" / row.path, **CLIP)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    root = tmp_path_factory.mktemp("hostile")
    videos = root / "data/videos"
    videos.mkdir(parents=True)
    (root / "outside").mkdir()
    write_numbered(root / SECRET, 8, Encoding(fps=10, codec="mpeg4"))
    good = write_numbered(videos / "good0.mp4", 8, Encoding(fps=10)).read_bytes()
    items: list[Any] = [{"path": "good0.mp4", "cap": "good"}]
    for index, case in enumerate(CASES, start=1):
        if case.make is not None:
            (videos / case.name).parent.mkdir(parents=True, exist_ok=True)
            case.make(videos / case.name)
            if (videos / case.name).is_file() and not (videos / case.name).is_symlink():
                make_unique(videos / case.name, index)
        whole = not isinstance(case.item, dict)
        items.append(case.item if whole else {"path": case.name, "cap": "a", **case.item})
        (videos / f"good{index}.mp4").write_bytes(good + b"\0\0\0\x0cfree%04d" % index)
        items.append({"path": f"good{index}.mp4", "cap": f"good {index}"})
    (root / "data/videos2caption.json").write_text(json.dumps(items))
    recipe = make_recipe(root)
    store = ShardStore(recipe.shards.path)
    plan = plan_manifest(recipe, store=store, settings={})
    return Planned(recipe, store, plan, read_rows(store))


def make_unique(path: Path, index: int) -> None:
    """End a whole mp4 with an atom that players skip, so that equal videos differ in content."""
    data = path.read_bytes()
    if data[4:8] == b"ftyp" and path.name != "same_content.mp4" and "index" not in path.name:
        path.write_bytes(data + b"\0\0\0\x0cfree%04d" % (5000 + index))


def make_recipe(root: Path) -> Recipe:
    tree = {
        "model": {"family": "wan2.1", "path": "none"},
        "clip": CLIP,
        "source": {"kind": "merged", "path": str(root / "data")},
        "shards": {"path": str(root / "shards"), "rows": 8},
        "run_dir": str(root / "run"),
        "preprocess": {"decode_workers": 0},
    }
    return Recipe.parse(tree, origin="test")


def cases() -> Iterator[Any]:
    assert len({case.name for case in CASES}) == len(CASES)
    for index, case in enumerate(CASES):
        yield pytest.param(index, case, id=case.name.encode("ascii", "replace").decode()[:40])


@pytest.mark.parametrize(("index", "case"), list(cases()))
def test_each_item_ends_in_one_state_with_its_reason(
    planned: Planned, index: int, case: Case
) -> None:
    row = planned.rows[2 * index + 1]
    assert (row.state, row.reason) == case.expected, row.detail
    assert bool(row.detail) == (row.state != "accepted")
    if row.state != "accepted":
        assert row.shard is None
    elif case.decodes:
        with pytest.raises(ClipFault) as caught:
            planned.decode(row)
        assert caught.value.reason == case.decodes
    else:
        frames = planned.decode(row)
        assert frames.shape == (5, 48, 64, 3)
        first = corners_of(frames[0])
        assert first == list(CORNERS)
        assert number_of(frames[0]) == 0


def test_every_good_neighbour_is_accepted_and_decodes(planned: Planned) -> None:
    neighbours = planned.rows[::2]
    assert {row.state for row in neighbours} == {"accepted"}
    frames = planned.decode(neighbours[-1])
    assert [number_of(frame) for frame in frames] == [0, 1, 2, 3, 4]
    for row in neighbours[1::8]:
        assert planned.decode(row).tobytes() == frames.tobytes()


def test_the_ledger_has_every_item_once_and_in_order(planned: Planned) -> None:
    rows = list(ledger(planned.store, planned.plan))
    assert [row.item for row in rows] == list(range(2 * len(CASES) + 1))
    expected = Counter(case.expected[0] for case in CASES)
    found = Counter(row.state for row in rows)
    assert found["failed"] == expected["failed"]
    assert found["filtered"] == expected["filtered"]
    assert found["pending"] == expected["accepted"] + len(CASES) + 1


def test_planning_again_changes_nothing(planned: Planned) -> None:
    before = planned.store.manifest.read_bytes()
    plan = plan_manifest(planned.recipe, store=planned.store, settings={})
    assert plan == planned.plan
    assert planned.store.manifest.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[{"path": "a.mp4", "cap": "a"},\n]', 2),
        ('{"path": "a.mp4", "cap": "a"}', 1),
        ("path,cap\na.mp4,a cat\n", 1),
        ("", 1),
        ("[]", 1),
        (b'\xef\xbb\xbf[{"path": "a.mp4", "cap": "a"}]', 1),
        ('[\n\n{"path": "é.mp4"}]'.encode("latin-1"), 3),
    ],
)
def test_an_unreadable_list_is_one_error_that_names_the_line(
    content: str | bytes, line: int, tmp_path: Path
) -> None:
    (tmp_path / "data/videos").mkdir(parents=True)
    file = tmp_path / "data/videos2caption.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    store = ShardStore(tmp_path / "shards")
    with pytest.raises(UserError) as caught:
        plan_manifest(make_recipe(tmp_path), store=store, settings={})
    assert str(caught.value).startswith(f"{file}: line {line}")
    assert "\n" not in str(caught.value)
    assert not store.root.exists()
