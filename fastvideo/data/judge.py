# SPDX-License-Identifier: Apache-2.0
"""What is known and decided about each item of a source, before it has a place in a shard."""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvideo.config.recipe import Clip, Recipe
from fastvideo.config.source import HfSource, MergedSource, Source
from fastvideo.data.decode import VideoInfo
from fastvideo.data.examine import Examined, examine
from fastvideo.data.filters import reject_captions, reject_video, usable_captions
from fastvideo.data.footage import Footage, Origin
from fastvideo.data.items import Item


@dataclass(frozen=True)
class ClipRow:
    """What is known and decided about one input item."""

    item: int
    """Position in the source, from 0."""
    id: str
    """What the source calls it, for a file the path as written; empty if there is none."""
    path: str
    """The file, relative to the folder of the source; of a row of a data file its id. A clip keeps
    its place by it. Empty if the item cannot be used."""
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
    """Size of the file that is the clip or holds it; this and what follows is 0 or empty if it was
    not looked at."""
    mtime_ns: int
    """Time of its last change."""
    sha256: str
    """Of the clip's content."""
    width: int
    """This and what follows is as in `VideoInfo`."""
    height: int
    fps: float
    num_frames: int
    duration_s: float
    rotation: int
    codec: str
    data_file: str = ""
    """The data file that holds it, relative to the folder of the source; empty for a file."""
    data_row: int | None = None
    """Of that data file, from 0."""

    @property
    def origin(self) -> Origin:
        """Where its bytes are."""
        return Origin(self.data_file, self.data_row) if self.data_file else Origin(self.path)

    def located(self, detail: str) -> str:
        """A detail with the place of a clip whose id does not say it."""
        return f"{self.origin}: {detail}" if self.data_file else detail


def judge(
    recipe: Recipe,
    source: MergedSource | HfSource,
    items: Sequence[Item],
    footage: Footage,
    *,
    known: Mapping[str, Examined],
    journal: Path,
) -> list[ClipRow]:
    """Look at the clips of a source of videos; rows without places, in its order.

    Args:
        recipe: ``clip`` and ``preprocess.decode_workers`` matter.
        source: The data set.
        items: What it lists.
        footage: Its clips.
        known: What is known of clips, by origin as text; they are not read if unchanged.
        journal: Where results go as they come.

    Raises:
        OSError: A file could not be read; no clip is to blame.
    """
    clips = {item.origin: item.stamp for item in items if item.origin is not None}
    workers = recipe.preprocess.decode_workers
    examined = examine(clips, footage, known=known, journal=journal, workers=workers)
    rows: list[ClipRow] = []
    once = _given_once(items)
    taken = set(once)
    for item in items:
        found = examined[item.origin] if item.origin is not None else None
        name = item.id if found is None or item.id in once else _name(item, found, taken=taken)
        taken |= {name} if found else set()
        rows.append(_judge_one(item, name=name, found=found, clip=recipe.clip, source=source))
    if source.filters.allow_duplicates:
        stated = {item.index for item in items if item.split is not None}
        return _with_twins_together(rows, stated=stated)
    return without_duplicates(rows)


def _given_once(items: Iterable[Item]) -> set[str]:
    """Names that the source gives to one clip each."""
    counts = collections.Counter(item.id for item in items if item.origin is not None)
    return {name for name, count in counts.items() if name and count == 1}


def _name(item: Item, found: Examined, *, taken: Collection[str]) -> str:
    """What a clip is called that has no name, or one that others have as well.

    It follows from its content, so that it stays when rows move or change their order.
    """
    digest = found.sha256[:16]
    names = (f"{item.id}#{digest}" if item.id else digest, f"{digest}#{item.origin}")
    name = next((name for name in names if name not in taken), names[-1])
    while name in taken:
        name += "'"
    return name


def without_duplicates(rows: Iterable[ClipRow]) -> list[ClipRow]:
    """Of accepted rows with the same content the first one counts, the others are filtered."""
    kept: list[ClipRow] = []
    first_with: dict[str, str] = {}
    for row in rows:
        if row.state == "accepted":
            twin = first_with.setdefault(row.sha256, row.id)
            if twin != row.id:
                detail = row.located(f"the same content as {twin!r}")
                row = with_verdict(row, "filtered", "duplicate_content", detail)
        kept.append(row)
    return kept


def _with_twins_together(rows: Sequence[ClipRow], *, stated: Collection[int]) -> list[ClipRow]:
    """Rows with the same content in one split, or training would see what is held out.

    It is that of the first of the items ``stated``, whose split the source says, else of the first
    row. Items that are stated keep their own.
    """
    splits: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row.item not in stated):
        splits.setdefault(row.sha256, row.split)
    return [
        dataclasses.replace(row, split=splits[row.sha256])
        if row.sha256 and row.item not in stated
        else row
        for row in rows
    ]


def with_verdict(
    row: ClipRow, verdict: Literal["filtered", "failed"], reason: str, detail: str
) -> ClipRow:
    """The row, not accepted."""
    return dataclasses.replace(row, state=verdict, reason=reason, detail=detail)


def seeded_split(clip: str, *, source: Source) -> str:
    """``train`` or ``heldout``, the same for a clip whatever other clips there are."""
    digest = hashlib.sha256(f"{source.heldout_seed}:{clip}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < source.heldout * 2**64 else "train"


def _judge_one(
    item: Item,
    *,
    name: str,
    found: Examined | None,
    clip: Clip,
    source: MergedSource | HfSource,
) -> ClipRow:
    filters = source.filters
    captions = usable_captions(item.captions, filters=filters) or item.captions
    split = (item.split or seeded_split(name, source=source)) if name else ""
    row = _row(item, name=name, found=found, captions=captions, split=split)
    if item.problem is not None:
        return with_verdict(row, *item.problem)
    assert found is not None
    if found.fault is not None:
        reason, detail = found.fault
        return with_verdict(row, "failed", reason, row.located(detail))
    assert found.info is not None
    rejected = reject_captions(captions, filters=filters)
    rejected = rejected or reject_video(found.info, clip=clip, filters=filters)
    if rejected is None:
        return row
    reason, detail = rejected
    return with_verdict(row, "filtered", reason, row.located(detail))


def _row(
    item: Item,
    *,
    name: str,
    found: Examined | None,
    captions: tuple[str, ...],
    split: str,
) -> ClipRow:
    info = found.info if found and found.info else VideoInfo(0, 0, 0, 0.0, 0, 0.0, "")
    origin = item.origin or Origin("")
    stored = origin.row is not None
    return ClipRow(
        item=item.index,
        id=name,
        path=name if stored else origin.file,
        captions=captions,
        split=split,
        state="accepted",
        reason="",
        detail="",
        shard=None,
        row=None,
        bytes=found.bytes if found else 0,
        mtime_ns=found.mtime_ns if found else 0,
        sha256=found.sha256 if found else "",
        data_file=origin.file if stored else "",
        data_row=origin.row,
        **vars(info),
    )
