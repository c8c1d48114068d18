# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong about a Hugging Face data set: one message with the way out."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from huggingface_hub import constants

from fastvideo import log
from fastvideo.config.source import HfSource
from fastvideo.data.listing import list_clips
from fastvideo.errors import UserError
from tests.hf_sets import (
    COMMIT,
    FORMS,
    embedded,
    write_cached,
    write_clips,
    write_rows,
    write_tar,
)
from tests.hf_sets import (
    VIDEO as VIDEO_TYPE,
)

Maker = Callable[[Path], object]
WRITERS = {form.name: form.write for form in FORMS}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries read the environment when they are imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def message_of(source: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        list_clips(HfSource(**source))
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_of(videos: list[Any], captions: list[Any], **options: Any) -> Maker:
    return lambda root: write_rows(root / "r.parquet", videos, captions, **options)


def file_of(name: str, content: bytes) -> Maker:
    def make(root: Path) -> None:
        root.mkdir()
        (root / name).write_bytes(content)

    return make


def text_of(name: str, content: str | bytes) -> Maker:
    def make(root: Path) -> None:
        write_clips(root, "a.mp4")
        data = content.encode() if isinstance(content, str) else content
        (root / name).write_bytes(data)

    return make


def damaged(root: Path) -> None:
    write_rows(root / "r.parquet", [{"bytes": b"x" * 9999, "path": "a"}], ["a"])
    data = (root / "r.parquet").read_bytes()
    (root / "r.parquet").write_bytes(data[: len(data) // 2])


def archive(root: Path) -> None:
    write_clips(root, "a.mp4")
    with zipfile.ZipFile(root / "more.zip", "w") as file:
        file.write(root / "a.mp4", "b.mp4")


def readme(text: str) -> Maker:
    def make(root: Path) -> None:
        WRITERS["folder with metadata.csv"](root)
        (root / "README.md").write_text(f"---\n{text}\n---\n")

    return make


def data_files(pattern: str) -> Maker:
    return readme(f"configs:\n- config_name: default\n  data_files: {pattern}")


def broken_state(root: Path) -> None:
    WRITERS["save_to_disk"](root)
    (root / "state.json").write_text('{"_data_files": [')


def cut_arrow(root: Path) -> None:
    WRITERS["save_to_disk"](root)
    (file,) = root.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:3000])


def cut_tar(root: Path) -> None:
    WRITERS["WebDataset"](root)
    (file,) = root.glob("*.tar")
    file.write_bytes(file.read_bytes()[:600])


def damaged_tar(root: Path) -> None:
    """The header of the second member; `tarfile` takes it for the end."""
    WRITERS["WebDataset"](root)
    (file,) = root.glob("*.tar")
    data = bytearray(file.read_bytes())
    begin = data.index(b"a.json")
    data[begin : begin + 4] = b"\xff" * 4
    file.write_bytes(data)


def joined_tars(root: Path) -> None:
    """As `cat` joins them: the second begins after the end of the first."""
    WRITERS["WebDataset"](root)
    (file,) = root.glob("*.tar")
    file.write_bytes(file.read_bytes() * 2)


def tar_without_end(root: Path) -> None:
    WRITERS["WebDataset"](root)
    (file,) = root.glob("*.tar")
    file.write_bytes(file.read_bytes().rstrip(b"\0"))
    with file.open("ab") as opened:
        opened.write(b"\0" * (-file.stat().st_size % 512))


def arrow_cut_between_batches(root: Path) -> None:
    table = pa.table({"video": pa.array([VIDEO], VIDEO_TYPE), "caption": ["a"]})
    root.mkdir()
    with open(root / "r.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
        file.flush()
        first = file.tell()
        writer.write_table(table)
    data = (root / "r.arrow").read_bytes()
    (root / "r.arrow").write_bytes(data[:first])


def saved_state(**entries: Any) -> Maker:
    def make(root: Path) -> None:
        WRITERS["save_to_disk"](root)
        (root / "state.json").write_text(json.dumps(entries))

    return make


def arrow_gone(root: Path) -> None:
    WRITERS["save_to_disk"](root)
    (file,) = root.glob("*.arrow")
    file.unlink()


def splits_gone(root: Path) -> None:
    WRITERS["save_to_disk of splits"](root)
    (root / "dataset_dict.json").write_text('{"version": 1}')


def with_video(name: str) -> Maker:
    """One more file beside the clips and the metadata of a folder."""

    def make(root: Path) -> None:
        WRITERS["folder with metadata.csv"](root)
        write_clips(root, name)

    return make


VIDEO = {"bytes": b"x", "path": "a.mp4"}
TWO = "r.parquet: has no column {}; its columns are {}: write as source.columns.{}"

# How the folder is made, keys of the source, what the message says.
MISTAKES: dict[str, tuple[Maker, dict[str, Any], list[str]]] = {
    "split": (
        WRITERS["folder with splits"],
        {"split": "validation"},
        ["source.split=validation:", "has the splits train, test"],
    ),
    "split of a saved set": (
        WRITERS["save_to_disk of splits"],
        {"split": "test"},
        ["source.split=test:", "has the splits dev, train"],
    ),
    "split without rows": (
        WRITERS["save_to_disk of splits"],
        {},
        ["source.split=train:", "has no rows"],
    ),
    "configuration": (
        WRITERS["configurations"],
        {"name": "z"},
        ["source.name=z:", "has the configurations x, y"],
    ),
    "no configuration": (
        WRITERS["configurations"],
        {},
        ["has the configurations x, y; write one as source.name"],
    ),
    "configuration of a folder": (
        WRITERS["folder with metadata.csv"],
        {"name": "z"},
        ["source.name=z:", "has the configurations default"],
    ),
    "configuration of a saved set": (
        WRITERS["save_to_disk"],
        {"name": "z"},
        ["source.name=z:", "written by save_to_disk", "remove the key"],
    ),
    "revision of a folder": (
        WRITERS["folder with metadata.csv"],
        {"revision": "main"},
        ["source.revision=main:", "is a folder", "remove the key"],
    ),
    "video column": (
        rows_of([VIDEO], ["a"]),
        {"columns": {"video": "film"}},
        ["r.parquet: has no column film; its columns are video, caption, other", "columns.video"],
    ),
    "caption column": (
        rows_of([VIDEO], ["a"]),
        {"columns": {"caption": "says"}},
        ["r.parquet: has no column says; its columns are video, caption, other", "columns.caption"],
    ),
    "caption column not found": (
        rows_of([VIDEO], ["a"], names=("video", "words")),
        {},
        ["has no column caption or ", "its columns are video, words, other", "columns.caption"],
    ),
    "video column not found": (
        rows_of(["a"], ["a"], names=("film", "caption"), kind=pa.string()),
        {},
        ["has no column video or ", "its columns are film, caption, other", "columns.video"],
    ),
    "caption column of numbers": (
        rows_of([VIDEO], ["a"]),
        {"columns": {"caption": "other"}},
        ["column other is of type int64", "texts or lists of texts"],
    ),
    "video column of numbers": (
        rows_of([VIDEO], ["a"]),
        {"columns": {"video": "other"}},
        ["column other is of type int64", "bytes, a path, or a struct of both"],
    ),
    "metadata without file names": (
        text_of("metadata.csv", "name,caption\na.mp4,a\n"),
        {},
        ["metadata.csv: has no column file_name or video or ", "its columns are name, caption"],
    ),
    "no metadata": (
        lambda root: write_clips(root, "a.mp4"),
        {},
        ["a folder of 1 videos without captions", "metadata.csv or metadata.jsonl beside them"],
    ),
    "archive": (archive, {}, ["more.zip is an archive", "unpack it"]),
    "empty folder": (Path.mkdir, {}, ["holds no data set that can be read", "metadata.jsonl"]),
    "other files": (
        file_of("a.h5", b""),
        {},
        ["a.h5: is of a form that is not read", ".parquet"],
    ),
    "metadata that is no JSON": (
        text_of("metadata.jsonl", '{"file_name": "a.mp4", "caption": "a"}\n{"file_name": \n'),
        {},
        ["metadata.jsonl: line 2, column"],
    ),
    "metadata that is no UTF-8": (
        text_of("metadata.csv", "file_name,caption\na.mp4,é\n".encode("latin-1")),
        {},
        ["metadata.csv: line 2: byte 0xe9 is not UTF-8"],
    ),
    "metadata that is no CSV": (
        text_of("metadata.csv", 'file_name,caption\na.mp4,"a\n'),
        {},
        ["metadata.csv: line 2: is no valid CSV"],
    ),
    "comma in a caption": (
        text_of("metadata.csv", "file_name,caption\na.mp4,a cat\na.mp4,a cat, sleeping\n"),
        {},
        ["metadata.csv: line 3: has more cells than the header has names, 2;", "double quotes"],
    ),
    "column twice": (
        text_of("metadata.csv", "file_name,caption,caption\na.mp4,a,b\n"),
        {},
        ["metadata.csv: line 1: two columns are called caption; rename or remove one"],
    ),
    "half a Parquet file": (damaged, {}, ["r.parquet: is not a whole Parquet file"]),
    "half an Arrow file": (cut_arrow, {}, ["data-00000-of-00001.arrow: is ", "make or download"]),
    "half a tar file": (cut_tar, {}, ["train-0000.tar: is not a whole tar file"]),
    "damaged tar file": (damaged_tar, {}, ["train-0000.tar: is not a whole tar file", "at byte"]),
    "joined tar files": (joined_tars, {}, ["train-0000.tar: is not a whole tar file", "at byte"]),
    "tar file without its end": (tar_without_end, {}, ["train-0000.tar: is not a whole tar file"]),
    "Arrow file that ends early": (
        arrow_cut_between_batches,
        {},
        ["r.arrow: is not a whole Arrow file (it has no end of stream)", "make or download"],
    ),
    "Arrow file that is not there": (
        arrow_gone,
        {},
        ["data-00000-of-00001.arrow: is not there, though the data set lists it", "download"],
    ),
    "saved set without splits": (splits_gone, {}, ["dataset_dict.json: does not list names"]),
    "saved set without files": (
        saved_state(_data_files=["a.arrow"]),
        {},
        ["state.json: does not list names", "save the data set again"],
    ),
    "saved set with files elsewhere": (
        saved_state(_data_files=[{"filename": "../x.arrow"}]),
        {},
        ["state.json names", "x.arrow as a data file, which is elsewhere"],
    ),
    "clip that makes a split": (
        with_video("sub/test.mp4"),
        {},
        ["has the splits test; for Hugging Face names", "here sub/test.mp4:", "`configs:`"],
    ),
    "clip that makes the split": (
        with_video("train 1.mp4"),
        {},
        ["without captions, though metadata is elsewhere", "here train 1.mp4:", "README.md"],
    ),
    "README with features of another kind": (
        readme("dataset_info: {features: 3}"),
        {},
        ["holds no data set that can be read (Expected a dict or a list"],
    ),
    "README with files of another kind": (data_files("3"), {}, ["Expected data_files in YAML"]),
    "broken README": (readme("configs: ["), {}, ["holds no data set that can be read (while"]),
    "README of another kind": (readme("configs: 3"), {}, ["Expected configs to be a list"]),
    "README that names nothing": (data_files("gone/*"), {}, ["holds no data set", "data files"]),
    "state that is no JSON": (broken_state, {}, ["state.json: is damaged", "save the data set"]),
    "archive that is none": (
        file_of("a.zip", b"PK"),
        {},
        ["holds no data set that can be read", "is not a zip file"],
    ),
    "file instead of a folder": (
        lambda root: root.write_bytes(b""),
        {},
        ["is a file; write the folder it is in"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_with_the_way_out(name: str, tmp_path: Path) -> None:
    make, keys, parts = MISTAKES[name]
    make(tmp_path / "set")
    message = message_of({"path": str(tmp_path / "set"), **keys})
    for part in parts:
        assert part in message
    assert "source." in message or str(tmp_path / "set") in message


def test_files_out_of_the_folder_are_not_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside.csv"
    outside.write_text("file_name,caption\na.mp4,a\n")
    data_files(str(outside))(tmp_path / "set")
    message = message_of({"path": str(tmp_path / "set")})
    assert f"names {outside} as a data file, which is elsewhere" in message
    data_files("../outside.csv")(tmp_path / "other")
    message = message_of({"path": str(tmp_path / "other")})
    assert "outside.csv as a data file, which is elsewhere" in message


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (
        str(tmp_path / "nowhere"),
        "data/clips--v2",
        "data/clips.git",
        "clips",
        "../clips",
    ):
        message = message_of({"path": path})
        assert "there is no such folder, and it is no id of a data set on the Hub" in message


def test_a_data_set_that_is_not_in_the_cache_is_told_with_the_command(tmp_path: Path) -> None:
    message = message_of({"path": "someone/clips", "revision": "v1.0"})
    assert f"looked for revision v1.0 of that data set in {tmp_path}/hub/datasets--" in message
    assert "holds no copy of it (HF_HUB_OFFLINE is set" in message
    assert "`hf download --repo-type dataset someone/clips --revision v1.0`" in message


def test_a_copy_that_a_broken_download_left_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    snapshot = write_cached(tmp_path)
    items, _ = list_clips(HfSource(path="someone/clips"))
    assert len(items) == 2
    known = [{"path": f"data/train-0000{i}-of-00002.parquet", "size": 1} for i in range(3)]
    remember(tmp_path, known)
    assert "holds an incomplete copy of it" in message_of({"path": "someone/clips"})
    assert (snapshot / "data").is_dir()


def remember(root: Path, files: list[dict[str, Any]]) -> None:
    """What the Hub said are the files of the commit, as its library keeps it."""
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    entries = {
        file["path"]: TreeCacheEntry(file["size"], "0" * 40, None, None, None) for file in files
    }
    write_tree_cache(str(root / "hub/datasets--someone--clips"), COMMIT, entries)


def test_videos_that_no_metadata_names_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.logger, "propagate", False)
    monkeypatch.setattr(log.logger, "handlers", [caplog.handler])
    WRITERS["folder with metadata.csv"](tmp_path / "set")
    write_clips(tmp_path / "set", "sub/c.mp4")
    list_clips(HfSource(path=str(tmp_path / "set")))
    assert caplog.messages == ["1 videos are not used, as no metadata names them: sub/c.mp4"]


def test_columns_of_usual_names_are_found_and_others_by_their_type(tmp_path: Path) -> None:
    videos = embedded(tmp_path / "clips", "a.mp4")
    write_rows(tmp_path / "set/r.parquet", videos, ["a"], names=("film", "prompt"))
    ((item,), footage) = list_clips(HfSource(path=str(tmp_path / "set")))
    assert (item.id, item.captions) == ("a.mp4", ("a",))
    assert item.origin is not None
    assert list(footage.read([item.origin])) == [videos[0]["bytes"]]


def test_in_metadata_the_names_of_files_come_before_a_column_called_video(tmp_path: Path) -> None:
    write_clips(tmp_path / "set", "a.mp4")
    table = "video,{},caption\nhttps://example.org/a,a.mp4,a\n"
    for name in ("file_name", "video_file_name"):
        (tmp_path / "set/metadata.csv").write_text(table.format(name))
        for columns in ({}, {"video": "video"}):
            source = HfSource.model_validate({"path": str(tmp_path / "set"), "columns": columns})
            ((item,), _) = list_clips(source)
            assert (item.id, item.problem) == ("a.mp4", None)


def test_a_key_that_only_later_rows_of_a_tar_have_is_a_column(tmp_path: Path) -> None:
    video = embedded(tmp_path / "clips", "a.mp4")[0]["bytes"]
    members = [("a.mp4", video), ("a.json", b"{}"), ("b.mp4", video), ("c.mp4", video)]
    write_tar(tmp_path / "set/a.tar", [*members, ("c.json", b'{"caption": "c"}')])
    items, _ = list_clips(HfSource(path=str(tmp_path / "set")))
    assert [item.captions for item in items] == [(), (), ("c",)]
