# SPDX-License-Identifier: Apache-2.0
"""Writes small data sets in the forms that Hugging Face's `datasets` understands; no network."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.media import Encoding, write_numbered

CLIP = {"num_frames": 5, "height": 48, "width": 64, "fps": 10.0}
VIDEO = pa.struct({"bytes": pa.binary(), "path": pa.string()})
FEATURES = {
    "video": {"_type": "Video"},
    "caption": {"dtype": "string", "_type": "Value"},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def clip_bytes(folder: Path, number: int, *, frames: int = 8) -> bytes:
    """A clip of its own content."""
    path = write_numbered(folder / f".{number}.mp4", frames, Encoding(fps=10, codec="mpeg4"))
    data = path.read_bytes() + b"\0\0\0\x0cfree%04d" % number  # an atom that players skip
    path.unlink()
    return data


def write_clips(folder: Path, *names: str, first: int = 0) -> None:
    """Clips as files, each of its own content."""
    for number, name in enumerate(names, start=first):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(clip_bytes(folder, number))


def write_rows(
    file: Path,
    videos: Sequence[Any],
    captions: Sequence[Any],
    *,
    kind: pa.DataType = VIDEO,
    names: tuple[str, str] = ("video", "caption"),
    features: bool = False,
    **options: Any,
) -> None:
    """A Parquet file; ``features`` adds what `datasets` writes of its columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {names[0]: pa.array(videos, kind), names[1]: pa.array(captions)}
    table = pa.table({**columns, "other": list(range(len(videos)))})
    if features:
        described = {**FEATURES, "other": {"dtype": "int64", "_type": "Value"}}
        metadata = {"huggingface": json.dumps({"info": {"features": described}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, file, **options)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], *, delimiter: str = ",") -> None:
    """A table of texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    """A JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar file with these members, whose names may repeat."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def embedded(folder: Path, *names: str | None, first: int = 0) -> list[dict[str, Any]]:
    """Videos as rows hold them."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = (clip_bytes(folder, number) for number in range(first, first + len(names)))
    return [{"bytes": data, "path": name} for data, name in zip(clips, names, strict=True)]


# ---------------------------------------------------------------- the table of forms


@dataclass(frozen=True)
class Form:
    """A data set, how it is named in a recipe, and what must come out."""

    name: str
    write: Callable[[Path], object]
    source: Mapping[str, Any] = field(default_factory=dict)
    """Over ``kind`` and ``path``, which is the folder unless it is here."""
    ids: tuple[str, ...] = ("a.mp4", "b.mp4")
    captions: tuple[tuple[str, ...], ...] = (("one",), ("two",))


def _named(key: str = "file_name", caption: str = "caption") -> list[dict[str, Any]]:
    return [{key: "a.mp4", caption: "one"}, {key: "b.mp4", caption: "two"}]


def _folder_csv(root: Path) -> None:
    write_clips(root, "a.mp4", "b.mp4")
    write_csv(root / "metadata.csv", _named())


def _folder_lines(root: Path) -> None:
    write_clips(root, "a.mp4", "sub/b.mp4")
    rows = [
        {"file_name": "a.mp4", "caption": ["one", "uno"]},
        {"file_name": "sub/b.mp4", "caption": ["two"]},
    ]
    write_lines(root / "metadata.jsonl", rows)


def _folder_splits(root: Path) -> None:
    for number, split in enumerate(("train", "test")):
        write_clips(root / split, "a.mp4", "b.mp4", first=2 * number)
        write_csv(root / split / "metadata.csv", _named())


def _folder_parquet(root: Path) -> None:
    write_clips(root, "a.mp4", "b.mp4")
    rows = pa.table({"clip_file_name": ["a.mp4", "b.mp4"], "text": ["one", "two"]})
    pq.write_table(rows, root / "metadata.parquet")


def _parquet(root: Path) -> None:
    videos = embedded(root, "a.mp4", "b.mp4")
    for number, caption in enumerate(("one", "two")):
        file = root / f"data/train-0000{number}-of-00002.parquet"
        write_rows(file, videos[number : number + 1], [caption], features=True)


def _parquet_bytes(root: Path) -> None:
    videos = [video["bytes"] for video in embedded(root, None, None)]
    file = root / "part.parquet"
    write_rows(file, videos, [["one", "uno"], ["two"]], kind=pa.binary(), names=("film", "says"))


def _parquet_paths(root: Path) -> None:
    write_clips(root / "clips", "a.mp4", "b.mp4")
    paths = [{"bytes": None, "path": f"clips/{name}.mp4"} for name in "ab"]
    write_rows(root / "data/rows.parquet", paths, ["one", "two"], features=True)
    _describe(root, "data/rows.parquet")


def _describe(root: Path, file: str) -> None:
    """Else `datasets` takes the folder for one of videos, as most of its files are."""
    text = f"---\nconfigs:\n- config_name: default\n  data_files: {file}\n---\n"
    (root / "README.md").write_text(text, encoding="utf-8")


def _configurations(root: Path) -> None:
    write_rows(root / "x/r.parquet", embedded(root, "x.mp4", first=7), ["x"], features=True)
    write_rows(root / "y/r.parquet", embedded(root, "a.mp4", "b.mp4"), ["one", "two"])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/*\n"
        for name, split in (("x", "train"), ("y", "dev"))
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")


def _saved(root: Path) -> None:
    _save(root, splits=False)


def _saved_splits(root: Path) -> None:
    _save(root, splits=True)


def _save(root: Path, *, splits: bool) -> None:
    import datasets

    sources = root.parent / f"{root.name}_sources"
    write_clips(sources, "a.mp4", "b.mp4")
    columns = {"video": [str(sources / f"{n}.mp4") for n in "ab"], "caption": ["one", "two"]}
    found = datasets.Dataset.from_dict(columns)
    found = found.cast_column("video", datasets.Video(decode=False))
    saved = datasets.DatasetDict({"dev": found, "train": found.select([])}) if splits else found
    saved.save_to_disk(root)


def _arrow(root: Path) -> None:
    """One file of each of Arrow's two forms."""
    videos = pa.array(embedded(root, "a.mp4", "b.mp4"), VIDEO)
    table = pa.table({"video": videos, "caption": ["one", "two"]})
    for number, writer in enumerate((pa.ipc.new_stream, pa.ipc.new_file)):
        with writer(root / f"train-{number}.arrow", table.schema) as file:
            file.write_table(table.slice(number, 1))


def _table(
    name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        write_clips(root, "a.mp4", "b.mp4")
        write(root / name, _named("path", "text"))
        _describe(root, name)

    return make


def _json_list(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(rows), encoding="utf-8")


def _tsv(file: Path, rows: list[dict[str, Any]]) -> None:
    write_csv(file, rows, delimiter="\t")


def _tar(root: Path) -> None:
    videos = embedded(root, None, None)
    members: dict[str, bytes] = {}
    for name, video, caption in zip("ab", videos, ("one", "two"), strict=True):
        members[f"{name}.mp4"] = video["bytes"]
        members[f"{name}.json"] = json.dumps({"caption": caption, "fps": 0}).encode()
    write_tar(root / "train-0000.tar", members.items())


def write_cached(root: Path, *, commit: str = COMMIT) -> Path:
    """A data set in the cache of the Hub below ``root``, as `hf download` leaves it."""
    repository = root / "hub/datasets--someone--clips"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    _parquet(snapshot)
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.rglob("*.parquet"))):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    return snapshot


HUB = {"path": "someone/clips"}
FORMS = (
    Form("folder with metadata.csv", _folder_csv),
    Form("folder, streamed", _folder_csv, {"streaming": True}),
    Form(
        "folder with metadata.jsonl and lists of captions",
        _folder_lines,
        ids=("a.mp4", "sub/b.mp4"),
        captions=(("one", "uno"), ("two",)),
    ),
    Form(
        "folder with splits",
        _folder_splits,
        {"split": "test", "columns": {"video": "video"}},
        ids=("test/a.mp4", "test/b.mp4"),
    ),
    Form(
        "folder with metadata.parquet",
        _folder_parquet,
        {"columns": {"video": "clip", "caption": "text"}},
    ),
    Form("Parquet with bytes and names", _parquet),
    Form("Parquet, streamed", _parquet, {"streaming": True}),
    Form(
        "Parquet with bytes alone",
        _parquet_bytes,
        {"columns": {"video": "film", "caption": "says"}},
        ids=("", ""),
        captions=(("one", "uno"), ("two",)),
    ),
    Form("Parquet with paths", _parquet_paths, ids=("clips/a.mp4", "clips/b.mp4")),
    Form("configurations", _configurations, {"name": "y", "split": "dev"}),
    Form("save_to_disk", _saved),
    Form("save_to_disk of splits", _saved_splits, {"split": "dev"}),
    Form("Arrow files", _arrow),
    Form("CSV", _table("rows.csv", write_csv)),
    Form("TSV", _table("rows.tsv", _tsv)),
    Form("JSON lines", _table("rows.jsonl", write_lines)),
    Form("JSON list", _table("rows.json", _json_list)),
    Form("WebDataset", _tar),
    Form("Hub, cached", lambda root: write_cached(root.parent), HUB),
    Form("Hub, cached, by commit", lambda root: None, {**HUB, "revision": COMMIT}),
    Form("Hub, cached, streamed offline", lambda root: None, {**HUB, "streaming": True}),
)
