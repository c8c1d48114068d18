# SPDX-License-Identifier: Apache-2.0
"""Which files a split of a data set has; `datasets` finds them, or a saved set lists them."""

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvideo.config.recipe import HfSource
from fastvideo.data.hf.root import LocalRoot, Root
from fastvideo.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class SplitFiles:
    """The data files of a split."""

    tables: tuple[str, ...]
    """Relative to the root, in the order of the set."""
    is_folder: bool
    """Whether these are metadata of a folder of videos."""


def find_files(source: HfSource, root: Root) -> SplitFiles:
    """Find the files of ``source.split``.

    Raises:
        UserError: There is no such configuration or split, or nothing that can be read.
    """
    if isinstance(root, LocalRoot) and (saved := _saved_splits(root)):
        folder = _chosen(source, saved)
        state = json.loads((root.folder / folder / "state.json").read_text(encoding="utf-8"))
        names = [posixpath.join(folder, entry["filename"]) for entry in state["_data_files"]]
        return SplitFiles(tuple(names), is_folder=False)
    builder = _builder(source, root)
    splits = {str(split): files for split, files in builder.config.data_files.items()}
    files = [root.relative(file) for file in _chosen(source, splits)]
    if builder.name == "videofolder":
        return _folder(source, files)
    return SplitFiles(tuple(files), is_folder=False)


def _chosen(source: HfSource, splits: dict[str, Any]) -> Any:
    if source.split not in splits:
        raise UserError(
            f"source.split={source.split}: {source.path} has the splits {', '.join(splits)}"
        )
    return splits[source.split]


def _folder(source: HfSource, files: Sequence[str]) -> SplitFiles:
    tables = [file for file in files if posixpath.basename(file) in METADATA]
    archives = [file for file in files if file.lower().endswith(".zip")]
    if archives:
        raise UserError(
            f"source.path={source.path}: {archives[0]} is an archive, in which clips cannot be "
            "found again; unpack it"
        )
    if not tables:
        raise UserError(
            f"source.path={source.path}: the split {source.split} is a folder of {len(files)} "
            "videos without captions; put metadata.csv or metadata.jsonl beside them, with the "
            "columns file_name and caption, or name the file that has them as data_files in the "
            "folder's README.md"
        )
    return SplitFiles(tuple(tables), is_folder=True)


# ---------------------------------------------------------------- save_to_disk


def _saved_splits(root: LocalRoot) -> dict[str, str]:
    """Folders by split, if ``save_to_disk`` wrote this one."""
    if (root.folder / "dataset_dict.json").is_file():
        listed = json.loads((root.folder / "dataset_dict.json").read_text(encoding="utf-8"))
        return {split: split for split in listed["splits"]}
    if (root.folder / "state.json").is_file():
        state = json.loads((root.folder / "state.json").read_text(encoding="utf-8"))
        return {state.get("_split") or "train": ""} if "_data_files" in state else {}
    return {}


# ---------------------------------------------------------------- datasets


def _builder(source: HfSource, root: Root) -> Any:
    """What ``datasets`` makes of the folder or repository, before anything is loaded."""
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(root.address, source.name, revision=root.revision)
    except ValueError as error:
        raise UserError(_wrong_name(source, root) or f"{_at(source)}: {error}") from None
    except (RuntimeError, FileNotFoundError) as error:
        raise UserError(
            f"{_at(source)}: holds no data set that can be read ({_line(error)}); it needs "
            "Parquet, Arrow, CSV or JSON files, or videos with metadata.csv or metadata.jsonl"
        ) from None


def _wrong_name(source: HfSource, root: Root) -> str:
    """The message for a configuration that is not there, or that is needed; else empty."""
    from datasets import get_dataset_config_names

    try:
        names = get_dataset_config_names(root.address, revision=root.revision)
    except ValueError:
        return ""
    if source.name is None:
        needed = f"{_at(source)}: has the configurations {', '.join(names)}"
        return f"{needed}; write one as source.name" if len(names) > 1 else ""
    if source.name in names:
        return ""
    return f"source.name={source.name}: {source.path} has the configurations {', '.join(names)}"


def _at(source: HfSource) -> str:
    return f"source.path={source.path}"


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
