# SPDX-License-Identifier: Apache-2.0
"""Which columns of a data file hold the video and the caption."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from fastvideo.config.source import HfSource
from fastvideo.data.hf.cells import holds_texts, holds_videos, is_video_struct
from fastvideo.errors import UserError

VIDEO_NAMES = (
    "video",
    "mp4",
    "webm",
    "mkv",
    "mov",
    "avi",
    "clip",
    "file_name",
    "video_path",
    "path",
    "file",
)
CAPTION_NAMES = (
    "caption",
    "captions",
    "cap",
    "text",
    "prompt",
    "description",
    "txt",
    "json.caption",
)
"""What is looked for, in this order, where the recipe names no column."""

Types = Mapping[str, pa.DataType | None]
"""Of columns by name; None where the form has no types."""


@dataclass(frozen=True)
class Chosen:
    """Names of the two columns that are read."""

    video: str
    caption: str


def choose_columns(source: HfSource, types: Types, *, file: str, is_folder: bool) -> Chosen:
    """Choose the columns of one data file.

    Args:
        source: May name them.
        types: The columns there are.
        file: Its name, for the message.
        is_folder: Whether it is the metadata of a folder of videos, in which ``file_name`` stands
            for the column ``video``, and ``x_file_name`` for ``x``.

    Raises:
        UserError: A column is not there, none is found, or it cannot be what it is to be.
    """
    named = source.columns
    if named.video:
        videos = _spellings(named.video, is_folder=is_folder)
    else:
        videos = _likely_videos(types, is_folder=is_folder)
    captions = [named.caption] if named.caption else CAPTION_NAMES
    return Chosen(
        _first(
            _Kind("video", "bytes, a path, or a struct of both", holds_videos), videos, types, file
        ),
        _first(_Kind("caption", "texts or lists of texts", holds_texts), captions, types, file),
    )


@dataclass(frozen=True)
class _Kind:
    """One of the two columns."""

    key: str
    content: str
    """What it holds, for people."""
    holds: Callable[[pa.DataType], bool]


def _first(kind: _Kind, names: Sequence[str], types: Types, file: str) -> str:
    """The first of ``names`` that is there, if it can hold what it is to hold."""
    name = next((name for name in names if name in types), None)
    if name is None:
        raise UserError(
            f"{file}: has no column {' or '.join(names)}; its columns are {_list(types)}: write as "
            f"source.columns.{kind.key} the one that holds {kind.content}"
        )
    type_ = types[name]
    if type_ is not None and not kind.holds(type_):
        raise UserError(
            f"{file}: column {name} is of type {type_}; its columns are {_list(types)}: write as "
            f"source.columns.{kind.key} the one that holds {kind.content}"
        )
    return name


def _spellings(name: str, *, is_folder: bool) -> list[str]:
    """In metadata a file's name comes before what else is called like it, as for `datasets`."""
    if not is_folder:
        return [name]
    return [*(["file_name"] if name == "video" else []), f"{name}_file_name", name]


def _likely_videos(types: Types, *, is_folder: bool) -> list[str]:
    """Usual names, then what is stored as a video under another one; in metadata files first."""
    usual = [f"{name}_file_name" for name in VIDEO_NAMES if f"{name}_file_name" in types]
    others = [name for name in types if name.endswith("_file_name")]
    structs = [name for name, kind in types.items() if kind is not None and is_video_struct(kind)]
    files = ["file_name", *usual, *others] if is_folder else []
    return list(dict.fromkeys([*files, *VIDEO_NAMES, *structs]))


def _list(types: Types) -> str:
    return ", ".join(types) or "none"
