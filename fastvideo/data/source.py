# SPDX-License-Identifier: Apache-2.0
"""Reads a data set in the merged format: a folder ``videos/`` and its ``videos2caption.json``."""

from pathlib import Path
from typing import Any

from fastvideo.config.source import MergedSource
from fastvideo.data.entries import parse_entries
from fastvideo.data.footage import Folder, Origin
from fastvideo.data.items import (
    Item,
    Split,
    UnusableError,
    captions_of,
    clipped,
    is_unicode,
    relative_path,
    short,
    stamp_of_file,
)
from fastvideo.errors import UserError


def read_merged(source: MergedSource) -> list[Item]:
    """Read all items; one that cannot be used says why in ``problem``.

    The file is a JSON list or has a JSON object per line. An item has ``path``, relative to
    ``videos/``, ``cap``, a text or a list of texts, and may have ``split``, ``train`` or
    ``heldout``. Other keys are ignored: the files themselves are probed. ``path`` may not lead out
    of ``videos/``; links in there may.

    Raises:
        UserError: The folder or the file is missing or is not such a file.
        OSError: The disk failed, or access was denied.
    """
    file, videos = source.path / "videos2caption.json", merged_footage(source).root
    example = '[{"path": "a.mp4", "cap": "a caption"}, ...]'
    entries = parse_entries(_read(file), file=str(file), example=example)
    if not entries:
        raise UserError(f"{file}: line 1: there are no items; add one per clip")
    if not videos.is_dir():
        raise UserError(
            f"{source.path / 'videos'}: is not a folder; the paths in {file.name} are relative to "
            "it"
        )
    items: list[Item] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        item = _item(index, entry, videos=videos, seen=seen)
        if item.origin is not None:
            seen[item.origin.file] = index
        items.append(item)
    return items


def merged_footage(source: MergedSource) -> Folder:
    """The clips of a merged source."""
    return Folder(source.path.absolute() / "videos")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check source.path") from None


def _item(index: int, entry: Any, *, videos: Path, seen: dict[str, int]) -> Item:
    name = entry.get("path") if isinstance(entry, dict) else None
    identity = name if isinstance(name, str) and is_unicode(name) else ""
    captions: tuple[str, ...] = ()
    split: Split | None = None
    try:
        if not isinstance(entry, dict):
            raise UnusableError("failed", "bad_item", f"is {short(entry)}, not an object")
        relative = relative_path(_value(entry, "path"), key="path", root="videos/")
        captions = captions_of(_value(entry, "cap"), key="cap")
        split = _split(entry)
        if relative in seen:
            detail = f"path {short(name)} is that of item {seen[relative]}"
            raise UnusableError("filtered", "duplicate_path", detail)
        stamp = stamp_of_file(videos / relative)
        if not captions:
            raise UnusableError("filtered", "no_caption", f"cap is {short(entry['cap'])}")
    except UnusableError as problem:
        return Item(index, identity, None, (0, 0), captions, split, problem.args)
    return Item(index, identity, Origin(relative), stamp, captions, split, None)


def _split(entry: dict[str, Any]) -> Split | None:
    value = entry.get("split")
    if value not in (None, "train", "heldout"):
        detail = f"split is {short(value)}; write train or heldout, or leave it out"
        raise UnusableError("failed", "bad_item", detail)
    return value


def _value(entry: dict[str, Any], key: str) -> Any:
    if key not in entry:
        keys = ", ".join(map(short, entry)) or "none"
        raise UnusableError("failed", "bad_item", f"has no {key!r}; its keys: {clipped(keys)}")
    return entry[key]
