# SPDX-License-Identifier: Apache-2.0
"""Hashes and probes clips in parallel, once each: what is known is kept, even after a kill."""

import contextlib
import dataclasses
import hashlib
import json
import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo import atomic, hashing
from fastvideo.data.decode import DECODE_SETTINGS, ClipFault, VideoInfo, probe
from fastvideo.data.footage import Content, Footage, Origin, Stamp
from fastvideo.data.workers import in_order
from fastvideo.log import Progress

FEW = 16


@dataclass(frozen=True)
class Examined:
    """A clip's content as `probe` sees it."""

    bytes: int
    """Size of the file that is the clip or holds it."""
    mtime_ns: int
    """Time of that file's last change."""
    sha256: str
    """Of the clip."""
    info: VideoInfo | None
    """None for a clip with a fault."""
    fault: tuple[str, str] | None
    """(reason, detail) of that fault."""


def examine(
    clips: Mapping[Origin, Stamp],
    footage: Footage,
    *,
    known: Mapping[str, Examined],
    journal: Path,
    workers: int,
) -> dict[Origin, Examined]:
    """Hash and probe all clips.

    One whose file has the size and time of change in ``known`` is not read; one that is a row is
    not probed either if its content is known.

    Args:
        clips: Where they are, and the stamps of their files.
        footage: Reads them.
        known: What a finished run found, by origin as text.
        journal: Where results go as they come, for the next run if this one is killed.
        workers: Processes; a few clips are done without.

    Returns:
        Results by origin, in the order of ``clips``.

    Raises:
        OSError: A file could not be read; no clip is to blame.
    """
    known = {**known, **_read_journal(journal)}
    fresh: dict[Origin, Examined | None] = {}
    for origin, stamp in clips.items():
        old = known.get(str(origin))
        same = old and (old.bytes, old.mtime_ns) == stamp
        fresh[origin] = old if same else None
    todo = {origin: clips[origin] for origin, result in fresh.items() if result is None}
    if todo:
        jobs = _jobs(todo, footage, known={old.sha256: old for old in known.values()})
        processes = 0 if len(todo) <= FEW or workers <= 1 else workers
        results = in_order(_do, jobs, processes=processes, name=operator.attrgetter("name"))
        with contextlib.closing(results):
            fresh.update(_journaled(list(todo), results, journal=journal))
    return {origin: result for origin, result in fresh.items() if result is not None}


def examine_file(path: Path) -> Examined:
    """Hash and probe one file."""
    status = path.stat()
    sha256 = hashing.file_sha256(path)
    return Examined(status.st_size, status.st_mtime_ns, sha256, *_probed(path))


@dataclass(frozen=True)
class _Job:
    """A clip to look at."""

    name: str
    content: Content
    stamp: Stamp
    sha256: str = ""
    """Of a clip that is a row."""
    known: Examined | None = None
    """What is known of that content."""


def _jobs(
    clips: Mapping[Origin, Stamp], footage: Footage, *, known: Mapping[str, Examined]
) -> Iterator[_Job]:
    for (origin, stamp), content in zip(clips.items(), footage.read(clips), strict=True):
        if isinstance(content, Path):
            yield _Job(str(content), content, stamp)
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        old = known.get(sha256)
        yield _Job(str(origin), b"" if old else content, stamp, sha256, old)


def _do(job: _Job) -> Examined:
    if isinstance(job.content, Path):
        return examine_file(job.content)
    found = (job.known.info, job.known.fault) if job.known else _probed(job.content)
    return Examined(*job.stamp, job.sha256, *found)


def _probed(content: Content) -> tuple[VideoInfo | None, tuple[str, str] | None]:
    try:
        return probe(content), None
    except ClipFault as fault:
        return None, (fault.reason, fault.detail)


def _journaled(
    origins: Sequence[Origin], results: Generator[Examined], *, journal: Path
) -> Iterator[tuple[Origin, Examined]]:
    journal.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress("probe", total=len(origins))
    with open(journal, "a", encoding="utf-8") as file, contextlib.closing(progress):
        file.write("\n")  # ends a line that a kill cut off
        for origin, result in zip(origins, results, strict=True):
            line = {"name": str(origin), "version": DECODE_SETTINGS["version"]}
            file.write(json.dumps(line | dataclasses.asdict(result)) + "\n")
            file.flush()
            atomic.fault("probe")
            progress.advance(str(origin))
            yield origin, result


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
