# SPDX-License-Identifier: Apache-2.0
"""What is known and decided about each item of a source, before it has a place in a shard."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvideo.config.recipe import Clip, MergedSource, ParquetSource, Recipe
from fastvideo.data.decode import VideoInfo
from fastvideo.data.examine import Examined, examine
from fastvideo.data.filters import reject_captions, reject_video, usable_captions
from fastvideo.data.source import Item, read_merged


@dataclass(frozen=True)
class ClipRow:
    """What is known and decided about one input item."""

    item: int
    """Position in the source, from 0."""
    id: str
    """The path as the source writes it; empty if there is none."""
    path: str
    """The file, relative to ``videos/``; empty if the item cannot be used."""
    captions: tuple[str, ...]
    """Usable captions; all of them where none is."""
    split: str
    """``train`` or ``heldout``; empty without an id."""
    state: Literal["accepted", "filtered", "failed"]
    reason: str
    """Why it is not accepted, in snake_case."""
    detail: str
    """The same for people, with the offending value."""
    shard: int | None
    """None unless accepted."""
    row: int | None
    """Position in the shard; clips that fail later take none in the file."""
    bytes: int
    """Size of the file; this and what follows is 0 or empty if the file was not looked at."""
    mtime_ns: int
    """Time of its last change."""
    sha256: str
    """Of its content."""
    width: int
    """This and what follows is as in `VideoInfo`."""
    height: int
    fps: float
    num_frames: int
    duration_s: float
    rotation: int
    codec: str


def judge_merged(
    recipe: Recipe, source: MergedSource, *, known: Mapping[str, Examined], journal: Path
) -> list[ClipRow]:
    """Look at the clips of a merged source; rows without places, in its order.

    Args:
        recipe: ``clip`` and ``preprocess.decode_workers`` matter.
        source: The data set.
        known: What is known of files, by path below ``videos/``; they are not read if unchanged.
        journal: Where results go as they come.

    Raises:
        UserError: The source cannot be read.
        OSError: A file could not be read; no clip is to blame.
    """
    items = read_merged(source)
    videos = source.path.absolute() / "videos"
    paths = {i.index: str(i.path.relative_to(videos)) for i in items if i.path is not None}
    files = {paths[i.index]: i.path for i in items if i.path is not None}
    workers = recipe.preprocess.decode_workers
    examined = examine(files, known=known, journal=journal, workers=workers)
    rows = []
    for item in items:
        path = paths.get(item.index, "")
        judged = _judge_one(
            item, path=path, file=examined.get(path), clip=recipe.clip, source=source
        )
        rows.append(judged)
    return rows if source.filters.allow_duplicates else without_duplicates(rows)


def without_duplicates(rows: Iterable[ClipRow]) -> list[ClipRow]:
    """Of accepted rows with the same content the first one counts, the others are filtered."""
    kept: list[ClipRow] = []
    first_with: dict[str, str] = {}
    for row in rows:
        if row.state == "accepted":
            twin = first_with.setdefault(row.sha256, row.id)
            if twin != row.id:
                detail = f"the same content as {twin!r}"
                row = with_verdict(row, "filtered", "duplicate_content", detail)
        kept.append(row)
    return kept


def with_verdict(
    row: ClipRow, verdict: Literal["filtered", "failed"], reason: str, detail: str
) -> ClipRow:
    """The row, not accepted."""
    return dataclasses.replace(row, state=verdict, reason=reason, detail=detail)


def seeded_split(clip: str, *, source: MergedSource | ParquetSource) -> str:
    """``train`` or ``heldout``, the same for a clip whatever other clips there are."""
    digest = hashlib.sha256(f"{source.heldout_seed}:{clip}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < source.heldout * 2**64 else "train"


def _judge_one(
    item: Item, *, path: str, file: Examined | None, clip: Clip, source: MergedSource
) -> ClipRow:
    filters = source.filters
    captions = usable_captions(item.captions, filters=filters) or item.captions
    row = _row(item, path=path, file=file, captions=captions, source=source)
    if item.problem is not None:
        return with_verdict(row, *item.problem)
    assert file is not None
    if file.fault is not None:
        return with_verdict(row, "failed", *file.fault)
    assert file.info is not None
    rejected = reject_captions(captions, filters=filters)
    rejected = rejected or reject_video(file.info, clip=clip, filters=filters)
    return with_verdict(row, "filtered", *rejected) if rejected else row


def _row(
    item: Item,
    *,
    path: str,
    file: Examined | None,
    captions: tuple[str, ...],
    source: MergedSource,
) -> ClipRow:
    info = file.info if file and file.info else VideoInfo(0, 0, 0, 0.0, 0, 0.0, "")
    return ClipRow(
        item=item.index,
        id=item.id,
        path=path,
        captions=captions,
        split=(item.split or seeded_split(item.id, source=source)) if item.id else "",
        state="accepted",
        reason="",
        detail="",
        shard=None,
        row=None,
        bytes=file.bytes if file else 0,
        mtime_ns=file.mtime_ns if file else 0,
        sha256=file.sha256 if file else "",
        **vars(info),
    )
