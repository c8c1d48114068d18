# SPDX-License-Identifier: Apache-2.0
"""Takes the rows of upstream FastVideo's Parquet into the manifest and into our shards.

Nothing is encoded again: tensors are checked, brought to our layout and written once, after which
training reads them as fast as its own.
"""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastvideo import atomic
from fastvideo.config.recipe import Recipe
from fastvideo.config.source import ParquetSource
from fastvideo.data.judge import ClipRow, seeded_split, with_verdict, without_duplicates
from fastvideo.data.upstream import StoredClip, parquet_files, read_clips, read_tensors
from fastvideo.errors import UserError
from fastvideo.log import Progress, logger
from fastvideo.models.family import find_family
from fastvideo.models.folder import find_model, read_config
from fastvideo.state import ShardStore

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.models.family import LatentStatistics, Text

DERIVED = "pooled_text_embedding"
"""Upstream keeps HunyuanVideo's pooled text in the first row of ``text_embedding``."""

_JOURNAL_VERSION = 1
"""Of the entries of the journal; those of another one are not believed."""

Place = tuple[int, int]
"""Shard and row."""


def judge_parquet(
    recipe: Recipe,
    source: ParquetSource,
    *,
    store: ShardStore,
    columns: Sequence[str],
    placed: Mapping[str, Place],
) -> list[ClipRow]:
    """Look at every row of the files; rows without places, in the order of files and rows.

    Args:
        recipe: The clip size and the model matter.
        source: The folder.
        store: Keeps what is known of unchanged files.
        columns: Tensors that the model trains on.
        placed: Places of clips that have one, by path. Of rows with one id the first keeps it as
            it is, and of rows with the same content the first counts: these come before others,
            so that a file that is added changes nothing that is there.

    Raises:
        UserError: The folder or a file cannot be read as upstream's.
    """
    found = _listed(source.path, store)
    places = [placed.get(_path(clip), (math.inf, 0)) for clip, _ in found]
    wanted = _wanted(recipe, columns)
    names: set[str] = set()
    rows = []
    for index in sorted(range(len(found)), key=lambda i: (*places[i], i)):
        clip, stamp = found[index]
        name = _name(clip, taken=names)
        names.add(name)
        row = _row(recipe, source, clip, index=index, name=name, file=stamp)
        problem = _problem(clip, wanted)
        rows.append(with_verdict(row, *problem) if problem else row)
    if not source.allow_duplicates:
        rows = without_duplicates(rows)
    unconditional = sum(row.state == "accepted" and not row.captions[0].strip() for row in rows)
    if unconditional:
        logger.info(
            "%s: %d clips have an empty caption, and train as upstream's training_cfg_rate made "
            "them: without a text",
            source.path,
            unconditional,
        )
    return sorted(rows, key=lambda row: row.item)


@dataclasses.dataclass(frozen=True)
class Adopted:
    """Tensors of a row by our column stems, and its text."""

    tensors: "dict[str, Tensor]"
    text: "Text"


def adopted(
    recipe: Recipe, clips: Sequence[ClipRow], *, columns: Sequence[str]
) -> Iterator[Adopted]:
    """Yield what our shards hold of each clip, in order.

    ``vae_latent`` comes out raw and cut to the recipe's frames, text without its padding.

    Raises:
        UserError: A file is gone or changed.
    """
    source = recipe.source
    assert isinstance(source, ParquetSource)
    path, family = find_model(recipe.model.path), find_family(recipe)
    statistics, num_frames = family.latent_statistics(path), _latent_size(recipe)[0]
    stems = [name for name in columns if name != DERIVED]
    for file, stamp, rows in _runs(clips):
        _require_unchanged(source.path / file, stamp)
        for tensors in read_tensors(source.path, file, rows, only=stems):
            text = family.upstream_text(path, tensors.pop("text_embedding"))
            for name in ("vae_latent", "first_frame_latent"):
                if name in tensors:
                    tensors[name] = tensors[name][:, :num_frames]
            if source.latents == "normalised":
                tensors["vae_latent"] = statistics.denormalise(tensors["vae_latent"].float())
            yield Adopted(tensors, text)


class Normalisation:
    """Tells the user how latents were taken, and whether the figures bear it out."""

    def __init__(self, source: ParquetSource, statistics: "LatentStatistics") -> None:
        """Watch raw latents of ``source``."""
        self._source, self._statistics = source, statistics
        self._trained: list[float] = []
        self._otherwise: list[float] = []

    def see(self, raw_CTYX: "Tensor") -> None:
        """Take a latent into account, as it comes out of `adopted`."""
        raw = raw_CTYX.float()
        trained = self._statistics.normalise(raw)
        otherwise = raw if self._source.latents == "raw" else self._statistics.normalise(trained)
        self._trained.append(_spread(trained))
        self._otherwise.append(_spread(otherwise))

    def report(self) -> None:
        """Log what was seen, and warn if the other reading fits better."""
        if not self._trained:
            return
        trained, otherwise = (sum(s) / len(s) for s in (self._trained, self._otherwise))
        is_raw = self._source.latents == "raw"
        readings = ("as raw VAE output", "as already normalised")
        said, other = readings if is_raw else readings[::-1]
        logger.info(
            "%s: latents were taken %s; as training sees them, normalised with the model's "
            "latents_mean and latents_std, they have a standard deviation of %.2f per channel (1 "
            "is right)",
            self._source.path,
            said,
            trained,
        )
        if abs(otherwise - 1) < abs(trained - 1) / 2:
            logger.warning(
                "%s: taken %s the latents would have a standard deviation of %.2f, nearer to 1: "
                "they look %s; if so, set source.latents: %s",
                self._source.path,
                other,
                otherwise,
                "normalised already" if is_raw else "raw",
                "normalised" if is_raw else "raw",
            )


def _spread(latent_CTYX: "Tensor") -> float:
    """Per channel, so that a video's mean, which is far from 0, does not count."""
    return float(latent_CTYX.flatten(1).std(dim=1).mean())


# ---------------------------------------------------------------- listing

_Stamp = tuple[int, int]


def _listed(root: Path, store: ShardStore) -> list[tuple[StoredClip, _Stamp]]:
    """Every row of every file; a file that is as it was is not read again."""
    known = _read_journal(store.listed)
    files = parquet_files(root)
    store.root.mkdir(parents=True, exist_ok=True)
    found = []
    with contextlib.closing(Progress("files", total=len(files))) as progress:
        for file in files:
            stamp = _stamp(root / file)
            clips = known.get((file.as_posix(), *stamp))
            if clips is None:
                clips = read_clips(root, file)
                _append(store.listed, _line(file, stamp, clips))
            found += [(clip, stamp) for clip in clips]
            progress.advance(str(file))
    return found


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _require_unchanged(path: Path, stamp: _Stamp) -> None:
    try:
        changed = _stamp(path) != stamp
    except FileNotFoundError:
        raise UserError(f"{path}: is gone since the manifest was planned") from None
    if changed:
        raise UserError(f"{path}: changed since the manifest was planned; preprocess again")


def _append(journal: Path, line: str) -> None:
    with open(journal, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # the first ends a line that a kill cut off
        file.flush()
        atomic.fault("listed")


def _line(file: Path, stamp: _Stamp, clips: Sequence[StoredClip]) -> str:
    entry = {"version": _JOURNAL_VERSION, "file": file.as_posix(), "stamp": stamp}
    return json.dumps({**entry, "clips": [vars(clip) for clip in clips]})


def _read_journal(path: Path) -> dict[tuple[str, int, int], list[StoredClip]]:
    """What is known; a line that a kill cut short is left out."""
    if not path.is_file():
        return {}
    known = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("version") == _JOURNAL_VERSION:
            known[(entry["file"], *entry["stamp"])] = [_clip(clip) for clip in entry["clips"]]
    return known


def _clip(plain: dict[str, Any]) -> StoredClip:
    shapes, faults = (
        {stem: tuple(value) for stem, value in plain[name].items()} for name in ("shapes", "faults")
    )
    return StoredClip(**{**plain, "shapes": shapes, "faults": faults})


# ---------------------------------------------------------------- judging


def _latent_size(recipe: Recipe) -> tuple[int, int, int]:
    """(T, Y, X) of the recipe's clips."""
    clip, facts = recipe.clip, recipe.architecture
    return (
        (clip.num_frames - 1) // facts.temporal_stride + 1,
        clip.height // facts.spatial_stride,
        clip.width // facts.spatial_stride,
    )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What the recipe's model takes; None where its configs do not say."""

    model: str
    columns: tuple[str, ...]
    latent: tuple[int, int, int, int]
    text_dim: int | None
    least_text: int
    image_features: tuple[int, int] | None


def _wanted(recipe: Recipe, columns: Sequence[str]) -> _Wanted:
    path = find_model(recipe.model.path)
    text = read_config(path, "text_encoder/config.json")
    image = read_config(path, "image_encoder/config.json") if "clip_feature" in columns else {}
    image = image.get("vision_config", image)
    sizes = [image.get(key) for key in ("image_size", "patch_size", "hidden_size")]
    features = None
    if all(isinstance(size, int) for size in sizes):
        features = ((sizes[0] // sizes[1]) ** 2 + 1, sizes[2])
    return _Wanted(
        model=recipe.model.path,
        columns=tuple(name for name in columns if name != DERIVED),
        latent=(len(find_family(recipe).latent_statistics(path).mean), *_latent_size(recipe)),
        text_dim=text.get("d_model", text.get("hidden_size")),
        least_text=2 if DERIVED in columns else 1,
        image_features=features,
    )


def _problem(
    clip: StoredClip, wanted: _Wanted
) -> tuple[Literal["filtered", "failed"], str, str] | None:
    for stem in wanted.columns:
        if stem not in clip.shapes:
            missing = (f"no_{stem}", f"{stem} is empty; {wanted.model} trains on it")
            return "failed", *clip.faults.get(stem, missing)
    latent, text = clip.shapes["vae_latent"], clip.shapes["text_embedding"]
    if latent[0] != wanted.latent[0]:
        detail = f"its latent has {latent[0]} channels, those of {wanted.model} {wanted.latent[0]}"
        return "failed", "other_vae", detail
    if wanted.text_dim not in (None, text[1]):
        detail = f"its text is {text[1]} wide, that of {wanted.model} {wanted.text_dim}"
        return "failed", "other_text_encoder", detail
    if text[0] < wanted.least_text:
        return "failed", "empty_text", f"text_embedding has {text[0]} rows, pooled text included"
    features = clip.shapes.get("clip_feature")
    if "clip_feature" in wanted.columns and wanted.image_features not in (None, features):
        assert features is not None and wanted.image_features is not None
        detail = (
            f"clip_feature is {list(features)}, of {wanted.model} {list(wanted.image_features)}"
        )
        return "failed", "other_image_encoder", detail
    if latent[2:] != wanted.latent[2:]:
        detail = f"its latent is {list(latent)}, the recipe's is {list(wanted.latent)}"
        return "filtered", "other_size", detail
    if latent[1] < wanted.latent[1]:
        detail = f"{latent[1]} latent frames, {wanted.latent[1]} are needed"
        return "filtered", "too_short", detail
    return None


def _path(clip: StoredClip) -> str:
    return f"{clip.file}#{clip.row}"


def _name(clip: StoredClip, *, taken: Collection[str]) -> str:
    """The id if it is still free: upstream's are file names, which may repeat."""
    name = clip.id
    if not name or name in taken:
        name = f"{clip.id}#{clip.file}:{clip.row}"
    while name in taken:
        name += "'"
    return name


def _row(
    recipe: Recipe,
    source: ParquetSource,
    clip: StoredClip,
    *,
    index: int,
    name: str,
    file: _Stamp,
) -> ClipRow:
    stride = recipe.architecture.temporal_stride
    _, num_latent_frames, *_ = clip.shapes.get("vae_latent", (0, 0))
    return ClipRow(
        item=index,
        id=name,
        path=_path(clip),
        captions=(clip.caption,),
        split=seeded_split(clip.id or name, source=source),  # a video's rows stay together
        state="accepted",
        reason="",
        detail="",
        shard=None,
        row=None,
        bytes=file[0],
        mtime_ns=file[1],
        sha256=clip.sha256,
        width=clip.width,
        height=clip.height,
        fps=clip.fps,
        num_frames=(num_latent_frames - 1) * stride + 1 if num_latent_frames else 0,
        duration_s=clip.duration_s,
        rotation=0,
        codec="parquet",
    )


def _runs(clips: Sequence[ClipRow]) -> Iterator[tuple[str, _Stamp, list[int]]]:
    """Neighbouring clips of one file with ascending rows, to be read in one go."""
    places = [(file, int(row)) for file, _, row in (c.path.rpartition("#") for c in clips)]
    starts = [
        i
        for i, (file, row) in enumerate(places)
        if i == 0 or file != places[i - 1][0] or row <= places[i - 1][1]
    ]
    for start, end in itertools.pairwise([*starts, len(places)]):
        stamp = (clips[start].bytes, clips[start].mtime_ns)
        yield places[start][0], stamp, [row for _, row in places[start:end]]
