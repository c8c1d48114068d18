# SPDX-License-Identifier: Apache-2.0
"""What is on disk and whether it is complete: names, markers, atomic writes; stdlib only."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1

# ---------------------------------------------------------------- writes that survive a kill


def fault(point: str) -> None:
    """Die here if a crash test asks for it: ``FASTVIDEO_FAULT=point`` or ``point:2`` (2nd pass).

    ``FASTVIDEO_FAULT_LOG`` names a file that lists the points passed.
    """
    log = os.environ.get("FASTVIDEO_FAULT_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(point + "\n")
    wanted, _, count = os.environ.get("FASTVIDEO_FAULT", "").partition(":")
    if wanted == point:
        remaining = int(count or 1) - 1
        os.environ["FASTVIDEO_FAULT"] = f"{point}:{remaining}"
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def replacing(path: Path, *, point: str) -> Iterator[Path]:
    """Yield a temporary name to write; then fsync, rename to ``path`` and fsync the folder.

    A kill at any moment leaves the old file or the new one, never a part. ``point`` names the
    fault points.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{_owner()}.tmp")
    try:
        yield temporary
        fault(f"{point}.write")
        sync(temporary)
        fault(f"{point}.fsync")
        os.replace(temporary, path)
        fault(f"{point}.rename")
        sync(path.parent)
        fault(f"{point}.done")
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, point: str) -> None:
    """Replace the content of ``path`` at once."""
    with replacing(path, point=point) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, *, point: str) -> None:
    """Replace ``path`` by ``value`` as JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    write_bytes(path, text.encode(), point=point)


def read_json(path: Path) -> Any:
    """Read JSON; None if the file is missing or not JSON, which is what an old kill leaves."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Remove temporary files that dead processes left beside ``path``."""
    for leftover in path.parent.glob(f".{_escape(path.name)}.*.tmp"):
        host, _, pid = leftover.name[len(path.name) + 2 : -len(".tmp")].rpartition("-")
        try:
            if host == socket.gethostname() and pid.isdigit():
                dead = not _alive(int(pid))
            else:
                dead = time.time() - leftover.stat().st_mtime > 24 * 3600
            if dead:
                leftover.unlink()
        except FileNotFoundError:
            continue


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own earlier attempt
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- fingerprints


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
            write_json(self._path, self._known, point="hashes")
        return str(entry[2])


# ---------------------------------------------------------------- shards


@dataclass(frozen=True)
class ShardStore:
    """Names of the files that preprocessing writes.

    ``manifest.json`` is the plan: settings, and for each shard its rows and the fingerprint that
    its marker must carry. ``clips.jsonl`` is the manifest without pyarrow, a line per input item.
    """

    root: Path

    @property
    def manifest(self) -> Path:
        """Table of all input items, Parquet."""
        return self.root / "manifest.parquet"

    @property
    def plan(self) -> Path:
        """Marker of the manifest, written last."""
        return self.root / "manifest.json"

    @property
    def clips(self) -> Path:
        """The manifest's rows for readers without pyarrow."""
        return self.root / "clips.jsonl"

    @property
    def hashes(self) -> Path:
        """Cache of file hashes."""
        return self.root / "hashes.json"

    @property
    def probes(self) -> Path:
        """What a plan in progress knows of the files; gone when it is done."""
        return self.root / "probes.jsonl"

    def shard(self, index: int) -> Path:
        """Parquet file of a shard."""
        return self.root / f"shard-{index:05d}.parquet"

    @property
    def validation(self) -> Path:
        """Embeddings of the empty prompt and of the validation prompts."""
        return self.root / "validation.parquet"

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan, or None if there is none or its files are not the ones it names."""
        plan = read_json(self.plan)
        if not isinstance(plan, dict) or plan.get("schema") != SCHEMA_VERSION:
            return None
        files = {self.manifest: plan["manifest_bytes"], self.clips: plan["clips_bytes"]}
        return plan if all(_size(path) == size for path, size in files.items()) else None

    def done(self, index: int, *, fingerprint: str) -> bool:
        """Whether a shard is complete and made from what ``fingerprint`` stands for."""
        return read_marker(self.shard(index), fingerprint=fingerprint) is not None


def marker_path(parquet: Path) -> Path:
    """The JSON marker beside a Parquet file."""
    return parquet.with_suffix(".json")


def read_marker(parquet: Path, *, fingerprint: str | None = None) -> dict[str, Any] | None:
    """Return the marker of a complete Parquet file, else None.

    Complete: the marker can be read, carries ``fingerprint`` (if given) and the file has the
    recorded size.
    """
    marker = read_json(marker_path(parquet))
    if not isinstance(marker, dict) or marker.get("schema") != SCHEMA_VERSION:
        return None
    if fingerprint is not None and marker["fingerprint"] != fingerprint:
        return None
    return marker if _size(parquet) == marker["bytes"] else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class LedgerRow:
    """What became of one input item: the manifest joined with the markers."""

    item: int
    id: str
    split: str
    state: Literal["encoded", "filtered", "failed", "pending"]
    reason: str
    detail: str
    shard: int | None


def ledger(store: ShardStore, plan: dict[str, Any]) -> Iterator[LedgerRow]:
    """Yield a row per input item, in the order of the source."""
    failed = {index: shard_failures(store, plan, index) for index in shard_indices(plan)}
    with open(store.clips, encoding="utf-8") as lines:
        for line in lines:
            clip = json.loads(line)
            state, reason, detail = clip["state"], clip["reason"], clip["detail"]
            if state == "accepted":
                failures = failed[clip["shard"]]
                if failures is None:
                    state = "pending"
                elif clip["id"] in failures:
                    state = "failed"
                    reason, detail = failures[clip["id"]]
                else:
                    state = "encoded"
            yield LedgerRow(
                clip["item"], clip["id"], clip["split"], state, reason, detail, clip["shard"]
            )


def shard_indices(plan: dict[str, Any]) -> list[int]:
    """Indices of the planned shards, ascending."""
    return sorted(map(int, plan["shards"]))


def shard_failures(
    store: ShardStore, plan: dict[str, Any], index: int
) -> dict[str, tuple[str, str]] | None:
    """Clips of a complete shard that failed: id to (reason, detail); None if it is not complete."""
    marker = read_marker(store.shard(index), fingerprint=plan["shards"][str(index)]["fingerprint"])
    if marker is None:
        return None
    return {entry["id"]: (entry["reason"], entry["detail"]) for entry in marker["failed"]}


# ---------------------------------------------------------------- the run directory


@dataclass(frozen=True)
class RunDir:
    """Names of the files of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe the run was started with."""
        return self.root / "recipe.yaml"

    @property
    def stop(self) -> Path:
        """Create this file to stop training with its state saved."""
        return self.root / "STOP"

    def training(self, transformer: str = "transformer") -> "TrainDir":
        """Files of the training of one transformer."""
        return TrainDir(self.root / "train" / transformer)

    @property
    def export(self) -> Path:
        """The model folder for diffusers."""
        return self.root / "export"

    @property
    def export_marker(self) -> Path:
        """Says what the export was made from, written last."""
        return self.root / "export" / "fastvideo.json"

    def generated(self, weights: str) -> Path:
        """Videos sampled from the ``export`` or the ``base`` model."""
        return self.root / "generate" / weights


@dataclass(frozen=True)
class TrainDir:
    """Names of the files of the training of one transformer."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A JSON object per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def complete_checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        folders = self.checkpoints.glob("step-????????") if self.checkpoints.is_dir() else []
        return sorted(int(f.name[5:]) for f in folders if read_checkpoint_marker(f) is not None)


def checkpoint_marker(folder: Path) -> Path:
    """The file whose presence makes a checkpoint complete."""
    return folder / "complete.json"


def read_checkpoint_marker(folder: Path) -> dict[str, Any] | None:
    """Return the marker of a checkpoint whose files all have the recorded size, else None."""
    marker = read_json(checkpoint_marker(folder))
    if not isinstance(marker, dict):
        return None
    sizes: dict[str, int] = marker["files"]
    return marker if all(_size(folder / n) == size for n, size in sizes.items()) else None


def prune_checkpoints(directory: TrainDir, *, keep_last: int) -> None:
    """Remove the oldest complete checkpoints, and what is left of ones that never got complete.

    The marker goes first, so that half a checkpoint is not taken for a whole one.
    """
    complete = directory.complete_checkpoints()
    for step in complete[:-keep_last]:
        checkpoint_marker(directory.checkpoint(step)).unlink()
        fault("checkpoint.prune")
    kept = complete[-keep_last:]
    folders = directory.checkpoints.glob("step-????????") if kept else []
    for folder in folders:
        step = int(folder.name[5:])
        if step < kept[-1] and step not in kept:
            shutil.rmtree(folder)
