# SPDX-License-Identifier: Apache-2.0
"""Which files a split of a data set has; `datasets` finds them, or a saved set lists them."""

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from yaml import YAMLError

from fastvideo.config.source import HfSource
from fastvideo.data.hf.root import LocalRoot, Root
from fastvideo.data.items import clipped
from fastvideo.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

_SPLIT_NAME = re.compile(
    r"(?:^|[-._ 0-9/])"
    r"(?:train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)"
    r"(?:[-._ 0-9/]|$)"
)
"""What `datasets` takes for a split in the path of a file."""

_UNREADABLE = (FileNotFoundError, RuntimeError, ImportError, YAMLError, BadZipFile)
_MISTYPED = (TypeError, AttributeError, KeyError)
"""Raised where a README holds a value of another type than is expected there."""


@dataclass(frozen=True)
class SplitFiles:
    """The data files of a split."""

    tables: tuple[str, ...]
    """Relative to the root, in the order of the set."""
    is_folder: bool
    """Whether these are metadata of a folder of videos."""
    videos: tuple[str, ...] = ()
    """The videos of that folder."""


def find_files(source: HfSource, root: Root) -> SplitFiles:
    """Find the files of ``source.split``.

    Raises:
        UserError: There is no such configuration or split, or nothing that can be read.
    """
    if isinstance(root, LocalRoot) and (saved := _saved_splits(root)):
        if source.name is not None:
            raise UserError(
                f"source.name={source.name}: {root.folder} was written by save_to_disk, which "
                "keeps one configuration; remove the key"
            )
        if source.split not in saved:
            raise UserError(_no_split(source, saved))
        return SplitFiles(tuple(_saved_files(root, saved[source.split])), is_folder=False)
    builder = _builder(source, root)
    splits = {str(split): files for split, files in builder.config.data_files.items()}
    if source.split not in splits:
        found = [root.relative(file) for files in splits.values() for file in files]
        raise UserError(f"{_no_split(source, splits)}{_split_names(source, found)}")
    files = [root.relative(file) for file in splits[source.split]]
    if builder.name == "videofolder":
        return _folder(source, root, files)
    return SplitFiles(tuple(files), is_folder=False)


def _no_split(source: HfSource, splits: Iterable[str]) -> str:
    return f"source.split={source.split}: {source.path} has the splits {', '.join(splits)}"


def _split_names(source: HfSource, files: Iterable[str]) -> str:
    """The way out for a folder in which names made splits, perhaps unmeant; else empty."""
    named = [file for file in files if _SPLIT_NAME.search(file)]
    if not named or not Path(source.path).expanduser().is_dir():
        return ""
    return (
        "; for Hugging Face names of files and folders such as train, validation, dev or test make "
        f"splits, here {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}: if none is "
        "meant, move or rename these, or say in the folder's README.md with a block `configs:` "
        "which data_files there are, see docs/datasets.md"
    )


def _folder(source: HfSource, root: Root, files: Sequence[str]) -> SplitFiles:
    tables = [file for file in files if posixpath.basename(file) in METADATA]
    archives = [file for file in files if file.lower().endswith(".zip")]
    if archives:
        raise UserError(
            f"source.path={source.path}: {archives[0]} is an archive, in which clips cannot be "
            "found again; unpack it"
        )
    if not tables:
        raise UserError(_no_captions(source, root, files))
    videos = tuple(file for file in files if file not in tables)
    return SplitFiles(tuple(tables), is_folder=True, videos=videos)


def _no_captions(source: HfSource, root: Root, files: Sequence[str]) -> str:
    found = (
        f"source.path={source.path}: the split {source.split} is a folder of {len(files)} videos "
        "without captions"
    )
    if _has_metadata(root) and (way_out := _split_names(source, files)):
        return f"{found}, though metadata is elsewhere in the folder{way_out}"
    return (
        f"{found}; put metadata.csv or metadata.jsonl beside them, with the columns file_name and "
        "caption, or name the file that has them as data_files in the folder's README.md"
    )


def _has_metadata(root: Root) -> bool:
    found = root.folder.rglob("metadata.*") if isinstance(root, LocalRoot) else ()
    return any(file.name in METADATA for file in found)


# ---------------------------------------------------------------- save_to_disk


def _saved_splits(root: LocalRoot) -> dict[str, str]:
    """Folders by split, if ``save_to_disk`` wrote this one."""
    file = "dataset_dict.json"
    if listed := _json(root, file):
        return {split: split for split in _names(listed.get("splits"), root.folder / file)}
    state = _json(root, "state.json")
    return {state.get("_split") or "train": ""} if "_data_files" in state else {}


def _saved_files(root: LocalRoot, folder: str) -> list[str]:
    file = posixpath.join(folder, "state.json")
    entries = _json(root, file).get("_data_files")
    listed = entries if isinstance(entries, list) else [entries]
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    files = _names(names, root.folder / file)
    return [root.relative(str(root.folder / folder / name)) for name in files]


def _names(values: Any, file: Path) -> list[str]:
    """Names that ``file`` lists."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{file}: does not list names as it should; save the data set again")
    return values


def _json(root: LocalRoot, file: str) -> dict[str, Any]:
    """Empty if there is no such file."""
    try:
        found = json.loads((root.folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{root.folder / file}: is damaged ({error}); save the data set again"
        ) from None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- datasets


def _builder(source: HfSource, root: Root) -> Any:
    """What ``datasets`` makes of the folder or repository, before anything is loaded."""
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(root.address, source.name, revision=root.revision)
    except ValueError as error:
        reason = _wrong_name(source, root) or f"source.path={source.path}: {_line(error)}"
        raise UserError(reason) from None
    except (*_UNREADABLE, *_MISTYPED) as error:
        raise UserError(
            f"source.path={source.path}: holds no data set that can be read ({_line(error)}); it "
            "needs files of the set in Parquet, Arrow, CSV, JSON or tar, or videos with "
            "metadata.csv or metadata.jsonl, and a README.md that says nothing else"
        ) from None


def _wrong_name(source: HfSource, root: Root) -> str:
    """The message for a configuration that is not there, or that is needed; else empty."""
    from datasets import get_dataset_config_names

    try:
        names = get_dataset_config_names(root.address, revision=root.revision)
    except (ValueError, *_MISTYPED):
        return ""
    has = f"{source.path} has the configurations {', '.join(names)}"
    if source.name is None and len(names) > 1:
        return f"source.path={has}; write one as source.name"
    return f"source.name={source.name}: {has}" if source.name and source.name not in names else ""


def _line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return clipped(next(filter(None, lines), type(error).__name__))
