# SPDX-License-Identifier: Apache-2.0
"""Reading videos2caption.json: every form it may have, and every mistake with its line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastvideo.config.source import MergedSource
from fastvideo.data.footage import Origin
from fastvideo.data.items import Item
from fastvideo.data.source import merged_footage, read_merged
from fastvideo.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "videos" / name).write_bytes(b"not looked at here")
    return tmp_path


def read_text(root: Path, text: str | bytes) -> list[Item]:
    data = text.encode() if isinstance(text, str) else text
    (root / "videos2caption.json").write_bytes(data)
    return read_merged(MergedSource(path=root))


def read_items(root: Path, *entries: Any) -> list[Item]:
    return read_text(root, json.dumps(list(entries)))


def problem_of(root: Path, entry: Any) -> tuple[str, str, str]:
    (item,) = read_items(root, entry)
    assert item.problem is not None
    assert item.origin is None
    return item.problem


# ---------------------------------------------------------------- good ones


def test_upstreams_item_is_read_and_its_hints_are_ignored(root: Path) -> None:
    hints = {"resolution": {"width": 1, "height": None}, "fps": "?", "num_frames": -1, "size": []}
    (item,) = read_items(root, {"path": "a.mp4", "cap": ["one", "two"], **hints})
    status = (root / "videos/a.mp4").stat()
    stamp = status.st_size, status.st_mtime_ns
    assert item == Item(0, "a.mp4", Origin("a.mp4"), stamp, ("one", "two"), None, None)


def test_a_caption_may_be_a_text(root: Path) -> None:
    (item,) = read_items(root, {"path": "a.mp4", "cap": " a cat ", "split": "heldout"})
    assert (item.captions, item.split) == ((" a cat ",), "heldout")


def test_blank_captions_beside_others_are_left_out(root: Path) -> None:
    (item,) = read_items(root, {"path": "a.mp4", "cap": ["", "a cat", " \n"]})
    assert item.captions == ("a cat",)


def test_json_lines_are_read_too(root: Path) -> None:
    lines = '{"path": "a.mp4", "cap": "a"}\n\n{"path": "b.mp4", "cap": "b"}\n'
    assert [item.id for item in read_text(root, lines)] == ["a.mp4", "b.mp4"]
    assert [item.id for item in read_text(root, lines.replace("\n", "\r\n"))] == ["a.mp4", "b.mp4"]


def test_a_relative_root_gives_absolute_paths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_items(root, {"path": "a.mp4", "cap": "a"})
    monkeypatch.chdir(root.parent)
    source = MergedSource(path=Path(root.name))
    (item,) = read_merged(source)
    assert item.origin is not None
    assert list(merged_footage(source).read([item.origin])) == [root / "videos/a.mp4"]


def test_links_may_lead_out_of_the_folder(root: Path) -> None:
    outside = root / "outside.mp4"
    outside.write_bytes(b"x")
    (root / "videos/link.mp4").symlink_to(outside)
    (root / "videos/folder").symlink_to(root)
    first, second = read_items(
        root, {"path": "link.mp4", "cap": "a"}, {"path": "folder/outside.mp4", "cap": "a"}
    )
    assert first.problem is None and second.problem is None


# ---------------------------------------------------------------- items

BAD = {
    "text": "a.mp4",
    "null": None,
    "list": ["a.mp4", "a cat"],
    "number": 3,
    "no path": {"cap": "a"},
    "number as path": {"path": 3, "cap": "a"},
    "null as path": {"path": None, "cap": "a"},
    "empty path": {"path": "", "cap": "a"},
    "zero byte in path": {"path": "a\0.mp4", "cap": "a"},
    "half a character in path": {"path": "\ud800.mp4", "cap": "a"},
    "no cap": {"path": "a.mp4", "caption": "a"},
    "number as cap": {"path": "a.mp4", "cap": 3},
    "object as cap": {"path": "a.mp4", "cap": {}},
    "number in cap": {"path": "a.mp4", "cap": ["ok", 3]},
    "half a character in cap": {"path": "a.mp4", "cap": "\udfff"},
    "wrong split": {"path": "a.mp4", "cap": "a", "split": "test"},
    "number as split": {"path": "a.mp4", "cap": "a", "split": 1},
    "list as split": {"path": "a.mp4", "cap": "a", "split": ["train"]},
}


@pytest.mark.parametrize("entry", BAD.values(), ids=BAD)
def test_an_item_of_a_wrong_type_is_failed(root: Path, entry: Any) -> None:
    state, reason, detail = problem_of(root, entry)
    assert (state, reason) == ("failed", "bad_item")
    assert detail.encode()


def test_the_detail_of_a_missing_key_names_the_keys_there_are(root: Path) -> None:
    assert problem_of(root, {"path": "a.mp4", "caption": "a"})[2] == (
        "has no 'cap'; its keys: 'path', 'caption'"
    )


@pytest.mark.parametrize("cap", [None, "", [], [""], [" ", "\n"]])
def test_an_item_without_a_caption_is_filtered(root: Path, cap: Any) -> None:
    assert problem_of(root, {"path": "a.mp4", "cap": cap})[:2] == ("filtered", "no_caption")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a.mp4", "..", "x/../../a.mp4", "../videos/a.mp4"]
)
def test_a_path_that_leads_out_is_failed(root: Path, path: str) -> None:
    state, reason, detail = problem_of(root, {"path": path, "cap": "a"})
    assert (state, reason) == ("failed", "outside_root")
    assert repr(path) in detail


@pytest.mark.parametrize("path", ["gone.mp4", "a.mp4/b.mp4", "x" * 300, "gone/../gone.mp4"])
def test_a_missing_file_is_failed(root: Path, path: str) -> None:
    assert problem_of(root, {"path": path, "cap": "a"})[:2] == ("failed", "missing_file")


def test_a_dangling_or_circular_link_is_a_missing_file(root: Path) -> None:
    (root / "videos/dangling.mp4").symlink_to(root / "nowhere")
    (root / "videos/circle.mp4").symlink_to("circle.mp4")
    for name in ("dangling.mp4", "circle.mp4"):
        assert problem_of(root, {"path": name, "cap": "a"})[1] == "missing_file"


def test_a_folder_or_a_pipe_is_not_a_file(root: Path) -> None:
    (root / "videos/folder.mp4").mkdir()
    os.mkfifo(root / "videos/pipe.mp4")
    for name in ("folder.mp4", "pipe.mp4", "."):
        assert problem_of(root, {"path": name, "cap": "a"})[:2] == ("failed", "not_a_file")


def test_the_second_of_two_equal_paths_is_filtered(root: Path) -> None:
    items = read_items(
        root,
        {"path": "a.mp4", "cap": ""},
        {"path": "a.mp4", "cap": "a"},
        {"path": "./a.mp4", "cap": "b"},
        {"path": "x/../a.mp4", "cap": "b"},
    )
    reasons = [item.problem and item.problem[1] for item in items]
    assert reasons == ["no_caption", None, "duplicate_path", "duplicate_path"]
    assert "item 1" in items[2].problem[2]  # type: ignore[index]


# ---------------------------------------------------------------- the whole file

WRONG = {
    "trailing comma": ('[{"path": "a.mp4", "cap": "a"},\n]', r"line 2, .*remove the comma"),
    "trailing comma inside": ('[\n{"path": "a.mp4", "cap": "a",}]', r"line 2, .*remove the comma"),
    "missing comma": ('[{"path": "a"}\n{"path": "b"}]', r"line 2, column 1"),
    "one object": ('{"path": "a.mp4", "cap": "a"}', r"line 1: is one object.*put \[ and \]"),
    "one object over lines": ('{\n"path": "a.mp4",\n"cap": "a"}', r"line 1: is one object"),
    "broken line": ('{"path": "a"}\n{"path": "b"\n{"path": "c"}', r"line 2, column 13"),
    "comma after line": ('{"path": "a"},\n{"path": "b"}', r"line 1, column 14"),
    "csv": ("path,cap\na.mp4,a cat\n", r"line 1: 'path,cap' is neither"),
    "csv below an empty line": ("\npath,cap\na.mp4,a cat\n", r"line 2: 'path,cap' is neither"),
    "empty": ("", r"line 1: there are no items"),
    "blank": (" \n", r"line 1: there are no items"),
    "empty list": ("[]", r"line 1: there are no items"),
    "byte order mark": (b'\xef\xbb\xbf[{"path": "a.mp4"}]', r"line 1: .*byte order mark"),
    "utf-16": ('[{"path": "a.mp4"}]'.encode("utf-16"), r"line 1: byte 0xff is not UTF-8"),
    "latin-1": ('[\n{"path": "é.mp4"}]'.encode("latin-1"), r"line 2: byte 0xe9 is not UTF-8"),
    "enormous number": ('[{"fps": ' + "9" * 5000 + "}]", r"line 1: cannot be read"),
    "too deep": ("[" * 100_000, r"line 1"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_file_of_another_form_is_one_error_with_its_line(
    root: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_text(root, text)
    assert str(root / "videos2caption.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/videos2caption\.json: .*No such file"):
        read_merged(MergedSource(path=tmp_path / "nowhere"))
    with pytest.raises(UserError, match="videos: is not a folder"):
        read_text(tmp_path, '[{"path": "a.mp4", "cap": "a"}]')
