# SPDX-License-Identifier: Apache-2.0
"""Hashes and probes files in parallel, once each: what is known is kept, even after a kill."""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import atomic, hashing
from fastvideo.data.decode import DECODE_SETTINGS, ClipFault, VideoInfo, die_with_parent, probe
from fastvideo.log import Progress, logger

FEW = 16
CHUNK = 4


@dataclass(frozen=True)
class Examined:
    """A file's content as `probe` sees it."""

    bytes: int
    mtime_ns: int
    sha256: str
    info: VideoInfo | None
    """None for a file with a fault."""
    fault: tuple[str, str] | None
    """(reason, detail) of that fault."""


def examine(
    files: Mapping[str, Path], *, known: Mapping[str, Examined], journal: Path, workers: int
) -> dict[str, Examined]:
    """Hash and probe all files; a file with the size and time of change in ``known`` is skipped.

    Args:
        files: Name to path.
        known: What a finished run found, by name.
        journal: Where results go as they come, for the next run if this one is killed.
        workers: Processes; a few files are done without.

    Returns:
        Results by name, in the order of ``files``.

    Raises:
        OSError: A file could not be read; no clip is to blame.
    """
    known = {**known, **_read_journal(journal)}
    fresh: dict[str, Examined | None] = {}
    for name, path in files.items():
        status, old = path.stat(), known.get(name)
        same = old and (old.bytes, old.mtime_ns) == (status.st_size, status.st_mtime_ns)
        fresh[name] = old if same else None
    todo = [name for name, result in fresh.items() if result is None]
    if todo:
        paths = [files[name] for name in todo]
        with contextlib.closing(_examined(paths, workers=workers)) as results:
            fresh.update(_journaled(todo, results, journal=journal))
    return {name: result for name, result in fresh.items() if result is not None}


def examine_file(path: Path) -> Examined:
    """Hash and probe one file."""
    status = path.stat()
    info, fault = None, None
    sha256 = hashing.file_sha256(path)
    try:
        info = probe(path)
    except ClipFault as clip_fault:
        fault = (clip_fault.reason, clip_fault.detail)
    return Examined(status.st_size, status.st_mtime_ns, sha256, info, fault)


def _examined(paths: Sequence[Path], *, workers: int) -> Generator[Examined]:
    if len(paths) <= FEW or workers <= 1:
        yield from map(examine_file, paths)
        return
    # spawn: a forked child of a process that uses threads may hang
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(paths)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=die_with_parent,
    )
    count = 0
    try:
        for result in pool.map(examine_file, paths, chunksize=CHUNK):
            yield result
            count += 1
    except BrokenProcessPool:
        suspects = "\n".join(map(repr, map(str, paths[count : count + CHUNK * workers])))
        logger.error("a process died, of a lack of memory or of one of these files:\n%s", suspects)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _journaled(
    names: Sequence[str], results: Generator[Examined], *, journal: Path
) -> Iterator[tuple[str, Examined]]:
    journal.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress("probe", total=len(names))
    with open(journal, "a", encoding="utf-8") as file, contextlib.closing(progress):
        file.write("\n")  # ends a line that a kill cut off
        for name, result in zip(names, results, strict=True):
            line = {"name": name, "version": DECODE_SETTINGS["version"]}
            file.write(json.dumps(line | dataclasses.asdict(result)) + "\n")
            file.flush()
            atomic.fault("probe")
            progress.advance(name)
            yield name, result


def _read_journal(journal: Path) -> dict[str, Examined]:
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    entries = (_parse(line) for line in lines if line)
    return {
        entry["name"]: Examined(
            bytes=entry["bytes"],
            mtime_ns=entry["mtime_ns"],
            sha256=entry["sha256"],
            info=VideoInfo(**entry["info"]) if entry["info"] else None,
            fault=(entry["fault"][0], entry["fault"][1]) if entry["fault"] else None,
        )
        for entry in entries
        if entry is not None and entry["version"] == DECODE_SETTINGS["version"]
    }


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
