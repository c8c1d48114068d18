# SPDX-License-Identifier: Apache-2.0
"""What is on disk and whether it is complete: names, markers, the ledger; stdlib only."""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvideo.atomic import fault, read_json
from fastvideo.errors import UserError
from fastvideo.hashing import fingerprint

SCHEMA_VERSION = 2
EXPORT_MARKER = "fastvideo.json"

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

    def num_probed(self) -> int:
        """How many files a plan in progress knows."""
        try:
            return sum(bool(line.strip()) for line in self.probes.read_bytes().split(b"\n"))
        except FileNotFoundError:
            return 0

    @property
    def listed(self) -> Path:
        """What is known of the files of a Parquet source, a line per file."""
        return self.root / "listed.jsonl"

    def shard(self, index: int) -> Path:
        """Parquet file of a shard."""
        return self.root / f"shard-{index:05d}.parquet"

    @property
    def validation(self) -> Path:
        """Embeddings of the empty prompt and of the validation prompts."""
        return self.root / "validation.parquet"

    @property
    def prompts_lock(self) -> Path:
        """Held by the process that encodes these prompts."""
        return self.root / "validation.lock"

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
    outcomes = {index: _outcomes(store, plan, index) for index in shard_indices(plan)}
    with open(store.clips, encoding="utf-8") as lines:
        for line in lines:
            clip = json.loads(line)
            state, reason, detail = clip["state"], clip["reason"], clip["detail"]
            if state == "accepted":
                outcome = outcomes[clip["shard"]].get(clip["id"], _PENDING)
                state, reason, detail = outcome
            yield LedgerRow(
                clip["item"], clip["id"], clip["split"], state, reason, detail, clip["shard"]
            )


def shard_indices(plan: dict[str, Any]) -> list[int]:
    """Indices of the planned shards, ascending."""
    return sorted(map(int, plan["shards"]))


def missing_shards(store: ShardStore, plan: dict[str, Any]) -> list[int]:
    """Planned shards that are not complete, ascending."""
    return [
        index
        for index in shard_indices(plan)
        if not store.done(index, fingerprint=plan["shards"][str(index)]["fingerprint"])
    ]


def complete_plan(store: ShardStore) -> dict[str, Any]:
    """Return the plan of shards that are all there; a ``UserError`` names those that are not."""
    plan = store.read_plan()
    if plan is None:
        raise UserError(f"{store.root}: holds no planned shards; run preprocess first")
    missing = missing_shards(store, plan)
    if missing:
        raise UserError(
            f"{store.root}: {len(missing)} of {len(plan['shards'])} shards are missing or out of "
            f"date ({shorten(missing)}); run preprocess"
        )
    return plan


def data_fingerprint(store: ShardStore, plan: dict[str, Any]) -> str:
    """What training depends on: shards by content, and the split of each encoded clip in order."""
    rows = (row for row in ledger(store, plan) if row.state == "encoded")
    clips = sorted((row.shard, row.id, row.split) for row in rows)
    return fingerprint({"shards": plan["shards"], "clips": clips})


def ranges(numbers: Iterable[int]) -> str:
    """``0-3,7``, the form that ``--shards`` takes, and Slurm for the tasks of an array."""
    return ",".join(_runs(numbers))


def shorten(indices: Iterable[int]) -> str:
    """The beginning of ``ranges`` if that is long."""
    runs = _runs(indices)
    return ",".join(runs[:10]) + (",..." if len(runs) > 10 else "")


def _runs(numbers: Iterable[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ["-".join(map(str, run)) for run in runs]


Outcome = tuple[Literal["encoded", "failed", "pending"], str, str]
_PENDING: Outcome = ("pending", "", "")


def _outcomes(store: ShardStore, plan: dict[str, Any], index: int) -> dict[str, Outcome]:
    """What the marker of a shard says of each of its clips; empty if it is not complete."""
    marker = read_marker(store.shard(index), fingerprint=plan["shards"][str(index)]["fingerprint"])
    if marker is None:
        return {}
    found: dict[str, Outcome] = {row["id"]: ("encoded", "", "") for row in marker["rows"]}
    for entry in marker["failed"]:
        found[entry["id"]] = ("failed", entry["reason"], entry["detail"])
    return found


# ---------------------------------------------------------------- the run directory


@dataclass(frozen=True)
class RunDir:
    """Names of the files of one run."""

    root: Path

    @property
    def stop(self) -> Path:
        """Create this file to stop training with its state saved."""
        return self.root / "STOP"

    def training(self, transformer: str = "transformer") -> "TrainDir":
        """Files of the training of one transformer."""
        return TrainDir(self.root / "train" / transformer)

    def resolved(self, expert: str | None) -> Path:
        """The recipe that the verbs of ``fastvideo run`` share; experts may run side by side."""
        return self.root / (f"run-{expert}.yaml" if expert else "run.yaml")

    @property
    def jobs(self) -> Path:
        """A folder per submission, see ``fastvideo.launch.folder``."""
        return self.root / "jobs"

    @property
    def export(self) -> Path:
        """The model folder for diffusers, or LoRA files for one."""
        return self.root / "export"

    @property
    def export_marker(self) -> Path:
        """Says what the export was made from, written last."""
        return self.export / EXPORT_MARKER

    def generated(self, weights: str) -> Path:
        """Videos sampled from the ``export``, the ``checkpoint`` or the ``base`` model."""
        return self.root / "generate" / weights


LORA_FILES = {
    "transformer": "pytorch_lora_weights.safetensors",
    "transformer_2": "pytorch_lora_weights_2.safetensors",
}
"""The LoRA of each transformer; the first is what diffusers looks for in a folder."""
NORM_FILES = {"transformer": "norms.safetensors", "transformer_2": "norms_2.safetensors"}
"""Norms that trained beside adapters: LoRA files have no place for them."""
COMFYUI_FILES = {"transformer": "comfyui.safetensors", "transformer_2": "comfyui_2.safetensors"}
"""The same LoRA by the names that ComfyUI knows."""


@dataclass(frozen=True)
class TrainDir:
    """Names of the files of the training of one transformer."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def recipe(self) -> Path:
        """The resolved recipe this training was started with."""
        return self.root / "recipe.yaml"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.root / "lock"

    @property
    def attempts(self) -> Path:
        """How often training was started from the newest checkpoint."""
        return self.root / "attempts.json"

    @property
    def launches(self) -> Path:
        """A folder per start of several processes: their logs and how each of them ended."""
        return self.root / "launches"

    @property
    def metrics(self) -> Path:
        """A JSON object per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def samples(self) -> Path:
        """Folders of the videos that were sampled while it trained."""
        return self.root / "samples"

    def sampled(self, step: int) -> Path:
        """Folder of the videos after ``step`` optimizer steps."""
        return self.samples / f"step-{step:08d}"

    def sampled_marker(self, step: int) -> Path:
        """The file whose presence says that all videos of ``step`` are made."""
        return self.sampled(step) / "complete.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def complete_checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        folders = self.checkpoint_folders()
        return [step for step in folders if read_checkpoint_marker(folders[step]) is not None]

    def newest_checkpoint(self) -> Path | None:
        """Folder of the newest complete checkpoint."""
        steps = self.complete_checkpoints()
        return self.checkpoint(steps[-1]) if steps else None

    def checkpoint_folders(self) -> dict[int, Path]:
        """Folders of checkpoints, complete or not, by step, ascending."""
        return {step: self.checkpoint(step) for step in _steps(self.checkpoints)}

    def sample_folders(self) -> dict[int, Path]:
        """Folders of videos, complete or not, by step, ascending."""
        return {step: self.sampled(step) for step in _steps(self.samples)}


def _steps(folder: Path) -> list[int]:
    """The steps that have a folder in this one, ascending."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"step-(\d{8})", path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


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


def newest_checkpoints(run_dir: RunDir, transformers: Collection[str]) -> dict[str, Path]:
    """The newest complete checkpoint of each of ``transformers`` that was trained in the run.

    Raises:
        UserError: None was.
    """
    found = {}
    for folder in transformers:
        if newest := run_dir.training(folder).newest_checkpoint():
            found[folder] = newest
    if not found:
        where = " and ".join(str(run_dir.training(folder).checkpoints) for folder in transformers)
        raise UserError(f"{where}: no complete checkpoint; run train first")
    return found


def prune_checkpoints(directory: TrainDir, *, keep_last: int, keep_every: int | None) -> None:
    """Remove the oldest complete checkpoints, and what is left of ones that never got complete.

    The marker goes first, so that half a checkpoint is not taken for a whole one. Those of steps
    divisible by ``keep_every`` stay.
    """
    complete = directory.complete_checkpoints()
    stay = [step for step in complete if keep_every and step % keep_every == 0]
    kept = sorted({*stay, *complete[-keep_last:]})
    for step in complete:
        if step not in kept:
            checkpoint_marker(directory.checkpoint(step)).unlink()
            fault("checkpoint.prune")
    for step, folder in directory.checkpoint_folders().items():
        if kept and step < kept[-1] and step not in kept:
            shutil.rmtree(folder)
