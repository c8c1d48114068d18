# SPDX-License-Identifier: Apache-2.0
"""An item of a source: where its clip is, its captions, or why it cannot be used."""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvideo.data.footage import Origin, Stamp

Split = Literal["train", "heldout"]
Problem = tuple[Literal["filtered", "failed"], str, str]


@dataclass(frozen=True)
class Item:
    """An entry of a source."""

    index: int
    """Position in the source, from 0."""
    id: str
    """What the source calls the clip; empty if it says nothing."""
    origin: Origin | None
    """Where the clip is; None if the item cannot be used."""
    stamp: Stamp
    """Of the file of ``origin``."""
    captions: tuple[str, ...]
    """As written, without blank ones."""
    split: Split | None
    """What the item says."""
    problem: Problem | None
    """(state, reason, detail) if the item cannot be used."""


class UnusableError(Exception):
    """Carries a ``Problem``."""


def captions_of(value: Any, *, key: str) -> tuple[str, ...]:
    """The captions in a text or a list of texts, without blank ones.

    Raises:
        UnusableError: ``bad_item``: it is something else.
    """
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        detail = f"{key} is {short(value)}, not a text or a list of texts"
        raise UnusableError("failed", "bad_item", detail)
    if not all(map(is_unicode, texts)):
        raise UnusableError("failed", "bad_item", f"{key} {short(value)} is no valid text")
    return tuple(text for text in texts if text.strip())


def relative_path(name: Any, *, key: str, folder: str = "", root: str) -> str:
    """A path as written, relative to the root of the source and normalised as text.

    Args:
        name: As written.
        key: Where it is written.
        folder: That it is relative to, itself relative to the root.
        root: Name of the root, for people.

    Raises:
        UnusableError: ``bad_item``: it is no path; ``outside_root``: it leads out of the root.
    """
    if not isinstance(name, str) or not name.strip():
        raise UnusableError("failed", "bad_item", f"{key} is {short(name)}, not a file name")
    if "\0" in name or not is_unicode(name):
        raise UnusableError("failed", "bad_item", f"{key} {short(name)} is no valid text")
    relative = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(relative) or relative == ".." or relative.startswith("../"):
        detail = f"{key} {short(name)} leads out of {root}; link or copy the file into it"
        raise UnusableError("failed", "outside_root", detail)
    return relative


_NAMING_FAULTS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def stamp_of_file(path: Path) -> Stamp:
    """Size and time of change of a clip.

    Raises:
        UnusableError: ``missing_file`` or ``not_a_file``.
        OSError: The disk failed, or access was denied.
    """
    try:
        status = path.stat()
    except OSError as error:
        # Any other error is the disk's or the account's, not the clip's.
        if error.errno in _NAMING_FAULTS:
            detail = f"{clipped(str(path))}: {error.strerror}"
            raise UnusableError("failed", "missing_file", detail) from None
        raise
    if not stat.S_ISREG(status.st_mode):
        detail = f"{clipped(str(path))}: is a folder or a device"
        raise UnusableError("failed", "not_a_file", detail)
    return status.st_size, status.st_mtime_ns


def is_unicode(text: str) -> bool:
    """False for halves of characters, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: Any) -> str:
    """A value for people, cut to a line."""
    return clipped(repr(value))


def clipped(text: str) -> str:
    """The beginning of a long text."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:197] + "..."
