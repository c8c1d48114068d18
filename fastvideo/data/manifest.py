# SPDX-License-Identifier: Apache-2.0
"""Plans preprocessing: one row per input item, and for each accepted clip its place in a shard."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastvideo import atomic, hashing, state
from fastvideo.config.recipe import Recipe
from fastvideo.config.source import ParquetSource
from fastvideo.data.adopt import judge_parquet
from fastvideo.data.changes import log_changes
from fastvideo.data.decode import DECODE_SETTINGS, VideoInfo
from fastvideo.data.examine import Examined
from fastvideo.data.judge import ClipRow, judge
from fastvideo.data.listing import list_clips
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.state import ShardStore

_INT, _TEXT = pa.int64(), pa.string()
_SCHEMA = pa.schema(
    [
        pa.field("item", _INT),
        *(pa.field(name, _TEXT) for name in ("id", "path")),
        pa.field("captions", pa.list_(_TEXT)),
        *(pa.field(name, _TEXT) for name in ("split", "state", "reason", "detail")),
        *(pa.field(name, _INT) for name in ("shard", "row", "bytes", "mtime_ns")),
        pa.field("sha256", _TEXT),
        *(pa.field(name, _INT) for name in ("width", "height")),
        pa.field("fps", pa.float64()),
        pa.field("num_frames", _INT),
        pa.field("duration_s", pa.float64()),
        pa.field("rotation", _INT),
        pa.field("codec", _TEXT),
        pa.field("data_file", _TEXT),
        pa.field("data_row", _INT),
    ]
)


def plan_manifest(recipe: Recipe, *, store: ShardStore, settings: dict[str, Any]) -> dict[str, Any]:
    """Look at every clip, give each accepted one a shard, and write the manifest and the plan.

    A clip keeps its shard as long as it is accepted, new clips make new shards, and an index is
    never used again. Files that are unchanged since the last plan are not read again. If nothing
    changed, nothing is written; otherwise the old plan goes first and the new one comes last, so
    that a kill leaves either no plan or one that fits its files.

    Args:
        recipe: ``source``, ``clip``, ``shards.rows`` and ``preprocess.decode_workers`` matter.
        store: Where to write.
        settings: Plain values that decide, with its clips, what a shard holds.

    Returns:
        The plan, as ``store.read_plan()`` reads it.

    Raises:
        UserError: The source cannot be read.
        OSError: A file could not be read; no clip is to blame.
    """
    settings = json.loads(hashing.canonical(settings))
    previous = _read_previous(store)
    rows = _judged(recipe, store=store, settings=settings, previous=previous)
    rows, next_shard = _place(rows, previous=previous, rows_per_shard=recipe.shards.rows)
    manifest = Manifest(rows, settings, next_shard)
    plan = _write(manifest, store=store)
    store.probes.unlink(missing_ok=True)
    _log_summary(rows, plan)
    if previous.next_shard:
        old = previous.clips_by_shard(), previous.settings
        log_changes(old=old, new=(manifest.clips_by_shard(), settings))
    return plan


def read_rows(store: ShardStore, shard: int | None = None) -> list[ClipRow]:
    """All rows in the order of the source, or those of one shard in its order.

    Raises:
        UserError: There is no manifest.
    """
    try:
        status = store.manifest.stat()
    except FileNotFoundError:
        message = f"{store.manifest}: there is no manifest; run preprocess --manifest-only first"
        raise UserError(message) from None
    rows, by_shard = _read_cached(store.manifest, status.st_size, status.st_mtime_ns)
    return list(rows if shard is None else by_shard.get(shard, ()))


def shard_fingerprint(settings: Mapping[str, Any], rows: Sequence[ClipRow]) -> str:
    """What the plan holds for a shard of these rows, in their order."""
    return _fingerprint(settings, {row.id: (row.sha256, row.captions) for row in rows})


def _judged(
    recipe: Recipe, *, store: ShardStore, settings: dict[str, Any], previous: "Manifest"
) -> list[ClipRow]:
    """A row per item of the source, without places."""
    source = recipe.source
    if isinstance(source, ParquetSource):
        return judge_parquet(
            recipe, source, store=store, columns=settings["columns"], placed=previous.places()
        )
    items, footage = list_clips(source)
    known = previous.examined()
    return judge(recipe, source, items, footage, known=known, journal=store.probes)


# ---------------------------------------------------------------- place


def _place(
    rows: Sequence[ClipRow], *, previous: "Manifest", rows_per_shard: int
) -> tuple[list[ClipRow], int]:
    """Give accepted rows a shard and a row; also returns the next free shard."""
    places = previous.places()
    accepted = [index for index, row in enumerate(rows) if row.state == "accepted"]
    assert len({rows[i].path for i in accepted}) == len(accepted), "a path is one clip's"
    kept = sorted((places[rows[i].path], i) for i in accepted if rows[i].path in places)
    new = [i for i in accepted if rows[i].path not in places]
    placed = list(rows)
    for shard, group in itertools.groupby(kept, key=lambda entry: entry[0][0]):
        for position, (_, index) in enumerate(group):
            placed[index] = dataclasses.replace(rows[index], shard=shard, row=position)
    for count, index in enumerate(new):
        shard, position = divmod(count, rows_per_shard)
        shard += previous.next_shard
        placed[index] = dataclasses.replace(rows[index], shard=shard, row=position)
    return placed, previous.next_shard + -(-len(new) // rows_per_shard)


# ---------------------------------------------------------------- write and read


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.parquet``."""

    rows: Sequence[ClipRow] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    next_shard: int = 0
    """Higher than any index that was ever used."""
    probe_version: int | None = DECODE_SETTINGS["version"]

    def clips_by_shard(self) -> dict[int, dict[str, tuple[str, tuple[str, ...]]]]:
        """For each shard in order: id to (sha256, captions), in order."""
        accepted = [row for row in self.rows if row.shard is not None]
        shards: dict[int, dict[str, tuple[str, tuple[str, ...]]]] = {}
        for row in sorted(accepted, key=lambda row: (row.shard, row.row)):
            assert row.shard is not None
            shards.setdefault(row.shard, {})[row.id] = (row.sha256, row.captions)
        return shards

    def places(self) -> dict[str, tuple[int, int]]:
        """Shard and row of each clip that has them, by path."""
        return {
            row.path: (row.shard, row.row)
            for row in self.rows
            if row.shard is not None and row.row is not None
        }

    def examined(self) -> dict[str, Examined]:
        """What is known of the clips, by origin as text, if this version of the code found it."""
        if self.probe_version != DECODE_SETTINGS["version"]:
            return {}
        return {str(row.origin): _examined(row) for row in self.rows if row.sha256}


_INFO_FIELDS = tuple(field.name for field in dataclasses.fields(VideoInfo))


def _examined(row: ClipRow) -> Examined:
    info = VideoInfo(**{name: getattr(row, name) for name in _INFO_FIELDS}) if row.codec else None
    fault = None if info else (row.reason, row.detail.removeprefix(row.located("")))
    return Examined(row.bytes, row.mtime_ns, row.sha256, info, fault)


def _write(manifest: Manifest, *, store: ShardStore) -> dict[str, Any]:
    table, clips = _parquet(manifest), _json_lines(manifest.rows)
    shards = {
        str(index): {
            "rows": len(entries),
            "fingerprint": _fingerprint(manifest.settings, entries),
        }
        for index, entries in manifest.clips_by_shard().items()
    }
    plan = {
        "schema": state.SCHEMA_VERSION,
        "settings": manifest.settings,
        "manifest_bytes": len(table),
        "clips_bytes": len(clips),
        "shards": shards,
    }
    same = _holds(store.manifest, table) and _holds(store.clips, clips)
    if not (same and atomic.read_json(store.plan) == plan):
        store.plan.unlink(missing_ok=True)
        atomic.fault("plan.remove")
        atomic.write_bytes(store.manifest, table, point="manifest")
        atomic.write_bytes(store.clips, clips, point="clips")
        atomic.write_json(store.plan, plan, point="plan")
    return plan


def _fingerprint(
    settings: Mapping[str, Any], clips: Mapping[str, tuple[str, tuple[str, ...]]]
) -> str:
    entries = [[clip, *entry] for clip, entry in clips.items()]
    return hashing.fingerprint({"settings": settings, "clips": entries})


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except FileNotFoundError:
        return False


def _parquet(manifest: Manifest) -> bytes:
    names = _SCHEMA.names
    columns = {name: [getattr(row, name) for row in manifest.rows] for name in names}
    metadata = {
        "fastvideo.schema": str(state.SCHEMA_VERSION),
        "fastvideo.probe_version": str(manifest.probe_version),
        "fastvideo.next_shard": str(manifest.next_shard),
        "fastvideo.settings": hashing.canonical(manifest.settings),
    }
    table = pa.table(columns, schema=_SCHEMA.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _json_lines(rows: Sequence[ClipRow]) -> bytes:
    keys = ("item", "id", "split", "state", "reason", "detail", "shard")
    lines = ({key: getattr(row, key) for key in keys} for row in rows)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode()


def _read_previous(store: ShardStore) -> Manifest:
    """The last manifest, with or without a plan; an empty one if there is none of this schema."""
    try:
        file = pq.ParquetFile(store.manifest)
    except FileNotFoundError:
        return Manifest()
    except pa.ArrowInvalid as error:
        logger.warning("%s: cannot be read and is planned anew: %s", store.manifest, error)
        return Manifest()
    metadata = file.schema_arrow.metadata or {}
    if metadata.get(b"fastvideo.schema") != str(state.SCHEMA_VERSION).encode():
        return Manifest()
    return Manifest(
        rows=_to_rows(file.read()),
        settings=json.loads(metadata[b"fastvideo.settings"]),
        next_shard=int(metadata[b"fastvideo.next_shard"]),
        probe_version=int(metadata[b"fastvideo.probe_version"]),
    )


def _to_rows(table: Any) -> list[ClipRow]:
    rows = (values | {"captions": tuple(values["captions"])} for values in table.to_pylist())
    return [ClipRow(**values) for values in rows]


@functools.lru_cache(maxsize=1)
def _read_cached(
    path: Path, size: int, mtime_ns: int
) -> tuple[list[ClipRow], dict[int, list[ClipRow]]]:
    """Preprocessing asks for one shard after the other."""
    rows = _to_rows(pq.read_table(path))
    by_shard: dict[int, list[ClipRow]] = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row.row or 0):
        if row.shard is not None:
            by_shard[row.shard].append(row)
    return rows, dict(by_shard)


def _log_summary(rows: Sequence[ClipRow], plan: Mapping[str, Any]) -> None:
    states = collections.Counter(row.state for row in rows)
    reasons = collections.Counter((row.state, row.reason) for row in rows)
    parts = []
    for name, count in states.most_common():
        why = [f"{reason} {n}" for (kind, reason), n in reasons.most_common() if kind == name]
        parts.append(f"{count} {name}" + (f" ({', '.join(why)})" if name != "accepted" else ""))
    logger.info("%d items: %s; %d shards", len(rows), ", ".join(parts), len(plan["shards"]))
