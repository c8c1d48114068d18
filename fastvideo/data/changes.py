# SPDX-License-Identifier: Apache-2.0
"""Says which shards a new plan makes encode again, and why."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastvideo.log import logger

Clips = Mapping[str, tuple[str, tuple[str, ...]]]
"""Id to (sha256, captions), in the order of the shard."""
Plan = tuple[Mapping[int, Clips], Mapping[str, Any]]
"""Clips by shard, and settings."""


def log_changes(*, old: Plan, new: Plan) -> None:
    """Log how many shards differ from ``old`` to ``new``; silent if none does."""
    settings = list(changed_settings(old[1], new[1]))
    both = [index for index in new[0] if index in old[0]]
    edited = [i for i in both if list(old[0][i].items()) != list(new[0][i].items())]
    added = [index for index in new[0] if index not in old[0]]
    again = both if settings else edited
    if again:
        why = [f"settings changed: {'; '.join(settings)}"] if settings else []
        clips = _changed_clips([(old[0][i], new[0][i]) for i in edited])
        why += [clips] if clips else []
        logger.info(
            "%d of %d shards are to be encoded again: %s", len(again), len(new[0]), "; ".join(why)
        )
    if added:
        count = sum(len(new[0][index]) for index in added)
        logger.info("%s added in %s", _many(count, "clip"), _many(len(added), "new shard"))
    gone = [index for index in old[0] if index not in new[0]]
    if gone:
        logger.info("%s without clips now", _many(len(gone), "shard"))


def changed_settings(old: Any, new: Any, *, key: str = "") -> Iterator[str]:
    """Yield ``key.path: old -> new`` for each difference."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else str(name)
            yield from changed_settings(old.get(name), new.get(name), key=inner)
    elif old != new:
        yield f"{key}: {_short(old)} -> {_short(new)}"


def _changed_clips(shards: list[tuple[Clips, Clips]]) -> str:
    removed = captions = content = 0
    for before, after in shards:
        removed += len(before.keys() - after.keys())
        for clip in before.keys() & after.keys():
            content += before[clip][0] != after[clip][0]
            captions += before[clip][1] != after[clip][1]
    counts = {
        "removed": removed,
        "with other captions": captions,
        "with other content": content,
    }
    return ", ".join(f"{_many(n, 'clip')} {what}" for what, n in counts.items() if n)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
