# SPDX-License-Identifier: Apache-2.0
"""Reads a data set in the merged format: a folder ``videos/`` and its ``videos2caption.json``."""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvideo.config.recipe import MergedSource
from fastvideo.errors import UserError

Split = Literal["train", "heldout"]
Problem = tuple[Literal["filtered", "failed"], str, str]


@dataclass(frozen=True)
class Item:
    """An entry of ``videos2caption.json``."""

    index: int
    """Position in the file, from 0."""
    id: str
    """``path`` as written; empty if there is none."""
    path: Path | None
    """The file, absolute; None if the item cannot be used."""
    captions: tuple[str, ...]
    """As written, without blank ones."""
    split: Split | None
    """What the item says."""
    problem: Problem | None
    """(state, reason, detail) if the item cannot be used."""


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
    file, videos = source.path / "videos2caption.json", source.path / "videos"
    entries = _read_entries(file)
    if not videos.is_dir():
        raise UserError(f"{videos}: is not a folder; the paths in {file.name} are relative to it")
    items: list[Item] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        item = _item(index, entry, videos=videos, seen=seen)
        if item.path is not None:
            seen[_normal(item.id)] = index
        items.append(item)
    return items


# ---------------------------------------------------------------- one item

_NAMING_FAULTS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class _UnusableError(Exception):
    """Carries a ``Problem``."""


def _item(index: int, entry: Any, *, videos: Path, seen: dict[str, int]) -> Item:
    name = entry.get("path") if isinstance(entry, dict) else None
    identity = name if isinstance(name, str) and _is_unicode(name) else ""
    captions: tuple[str, ...] = ()
    split: Split | None = None
    try:
        if not isinstance(entry, dict):
            raise _UnusableError("failed", "bad_item", f"is {_short(entry)}, not an object")
        relative = _relative(entry)
        captions = _captions(entry)
        split = _split(entry)
        if relative in seen:
            detail = f"path {_short(name)} is that of item {seen[relative]}"
            raise _UnusableError("filtered", "duplicate_path", detail)
        path = videos.absolute() / relative
        _check_file(path)
        if not captions:
            raise _UnusableError("filtered", "no_caption", f"cap is {_short(entry['cap'])}")
    except _UnusableError as problem:
        return Item(index, identity, None, captions, split, problem.args)
    return Item(index, identity, path, captions, split, None)


def _relative(entry: dict[str, Any]) -> str:
    """Path below ``videos/``, normalised as text."""
    name = _value(entry, "path")
    if not isinstance(name, str) or not name.strip():
        raise _UnusableError("failed", "bad_item", f"path is {_short(name)}, not a file name")
    if "\0" in name or not _is_unicode(name):
        raise _UnusableError("failed", "bad_item", f"path {_short(name)} is no valid text")
    relative = _normal(name)
    if os.path.isabs(name) or relative == ".." or relative.startswith("../"):
        detail = f"path {_short(name)} leads out of videos/; link or copy the file into it"
        raise _UnusableError("failed", "outside_root", detail)
    return relative


def _captions(entry: dict[str, Any]) -> tuple[str, ...]:
    value = _value(entry, "cap")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        detail = f"cap is {_short(value)}, not a text or a list of texts"
        raise _UnusableError("failed", "bad_item", detail)
    if not all(map(_is_unicode, texts)):
        raise _UnusableError("failed", "bad_item", f"cap {_short(value)} is no valid text")
    return tuple(text for text in texts if text.strip())


def _split(entry: dict[str, Any]) -> Split | None:
    value = entry.get("split")
    if value not in (None, "train", "heldout"):
        detail = f"split is {_short(value)}; write train or heldout, or leave it out"
        raise _UnusableError("failed", "bad_item", detail)
    return value


def _value(entry: dict[str, Any], key: str) -> Any:
    if key not in entry:
        keys = ", ".join(map(_short, entry)) or "none"
        raise _UnusableError("failed", "bad_item", f"has no {key!r}; its keys: {_clip(keys)}")
    return entry[key]


def _check_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        # Any other error is the disk's or the account's, not the clip's.
        if error.errno in _NAMING_FAULTS:
            detail = f"{_clip(str(path))}: {error.strerror}"
            raise _UnusableError("failed", "missing_file", detail) from None
        raise
    if not stat.S_ISREG(mode):
        raise _UnusableError("failed", "not_a_file", f"{_clip(str(path))}: is a folder or a device")


def _normal(name: str) -> str:
    return os.path.normpath(name)


def _is_unicode(text: str) -> bool:
    """False for halves of characters, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    return _clip(repr(value))


def _clip(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:197] + "..."


# ---------------------------------------------------------------- the whole file


def _read_entries(file: Path) -> list[Any]:
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check source.path") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{file}: line 1: starts with a byte order mark; save as plain UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise UserError(
            f"{file}: line {line}: byte {byte:#x} is not UTF-8; save as UTF-8"
        ) from None
    entries = list(_parse(text, file=file))
    if not entries:
        raise UserError(f"{file}: line 1: there are no items; add one per clip")
    return entries


def _parse(text: str, *, file: Path) -> Iterator[Any]:
    """Yield the items of a JSON list, or of lines with an object each."""
    start = text.lstrip()[:1]
    if start == "{":
        yield from _parse_lines(text, file=file)
    elif start in ("[", ""):
        yield from _loads(text, file=file, line=1) if start else ()
    else:
        first = text.lstrip().splitlines()[0]
        line = text[: len(text) - len(text.lstrip())].count("\n") + 1
        raise UserError(
            f"{file}: line {line}: {_short(first)} is neither a JSON list nor a JSON object; write "
            '[{"path": "a.mp4", "cap": "a caption"}, ...]'
        )


def _parse_lines(text: str, *, file: Path) -> Iterator[Any]:
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        raise UserError(f"{file}: line 1: is one object, not a list; put [ and ] around it")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _loads(line, file=file, line=number)


def _loads(text: str, *, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        # Python points at the bracket, from 3.13 on at the comma before it.
        dangling = re.search(r",\s*[]}]\Z", text[: error.pos + 1]) or re.match(
            r",\s*[]}]", text[error.pos :]
        )
        fix = "remove the comma before the closing bracket" if dangling else error.msg
        where = f"line {at}, column {error.colno}"
        raise UserError(f"{file}: {where}: is not valid JSON: {fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: line {line}: cannot be read as JSON: {error}") from None
