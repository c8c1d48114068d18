# SPDX-License-Identifier: Apache-2.0
"""Hashes that say whether something is still what it was, and seeds made the same way."""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastvideo.atomic import read_json, write_json


def canonical(value: Any) -> str:
    """Plain values as JSON that does not depend on the order of keys."""
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def fingerprint(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts and nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All files of a folder, sorted; linked folders count as folders, each once."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(root, f)) not in seen]
        found += (path for name in names if (path := Path(root, name)).is_file())
    return sorted(found)


def folder_stamp(folder: Path, *, without: Collection[str] = ()) -> str:
    """Changes when a file of a folder is added, removed, replaced or edited; reads no content.

    ``without`` names folders at the top that do not count.
    """
    entries = [
        [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in files_below(folder)
        if path.relative_to(folder).parts[0] not in without
    ]
    return fingerprint(entries)


class HashCache:
    """SHA-256 of large files, read again only when size or time of change differ."""

    def __init__(self, path: Path) -> None:
        """Keep the known hashes in the JSON file ``path``."""
        self._path = path
        known = read_json(path)
        self._known: dict[str, list[Any]] = known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        """Hash of the content of ``path``."""
        status = path.stat()
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        entry = self._known.get(key)
        if not entry or entry[:2] != stamp:
            self._known[key] = entry = [*stamp, file_sha256(path)]
            with contextlib.suppress(PermissionError):  # shards may be shared read-only
                write_json(self._path, self._known, point="hashes")
        return str(entry[2])
