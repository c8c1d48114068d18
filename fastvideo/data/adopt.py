# SPDX-License-Identifier: Apache-2.0
"""Takes the rows of upstream FastVideo's Parquet into the manifest and into our shards.

Nothing is encoded again: tensors are checked, brought to our layout and written once, after which
training reads them as fast as its own.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo.config.recipe import ParquetSource, Recipe
from fastvideo.data.judge import ClipRow, seeded_split, with_verdict, without_duplicates
from fastvideo.data.upstream import StoredClip, parquet_files, read_clips, read_tensors
from fastvideo.errors import UserError
from fastvideo.log import Progress, logger
from fastvideo.models.family import find_family
from fastvideo.models.folder import find_model
from fastvideo.state import ShardStore

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.models.family import LatentStatistics, Text

DERIVED = "pooled_text_embedding"
"""Upstream keeps HunyuanVideo's pooled text in the first row of ``text_embedding``."""


def judge_parquet(
    recipe: Recipe, source: ParquetSource, *, store: ShardStore, columns: Sequence[str]
) -> list[ClipRow]:
    """Look at every row of the files; rows without places, in the order of files and rows.

    Args:
        recipe: The clip size and the model's strides matter.
        source: The folder.
        store: Keeps what is known of unchanged files.
        columns: Tensors that the model trains on.

    Raises:
        UserError: The folder or a file cannot be read as upstream's.
    """
    found = [clip for _, clips in _listed(source.path, store) for clip in clips]
    names = collections.Counter(clip.id for clip, _ in found)
    wanted = _latent_size(recipe)
    rows = []
    for index, (clip, file) in enumerate(found):
        name = clip.id if clip.id and names[clip.id] == 1 else f"{clip.id}#{clip.file}:{clip.row}"
        row = _row(recipe, source, clip, index=index, name=name, file=file)
        problem = _problem(clip, wanted=wanted, columns=columns)
        rows.append(with_verdict(row, *problem) if problem else row)
    return rows if source.allow_duplicates else without_duplicates(rows)


@dataclasses.dataclass(frozen=True)
class Adopted:
    """Tensors of a row by our column stems, and its text."""

    tensors: "dict[str, Tensor]"
    text: "Text"


def adopted(
    recipe: Recipe, clips: Sequence[ClipRow], *, columns: Sequence[str], text_dim: int | None
) -> Iterator[Adopted]:
    """Yield what our shards hold of each clip, in order.

    ``vae_latent`` comes out raw and cut to the recipe's frames, text without its padding.

    Raises:
        UserError: A file changed, or the text is another encoder's (``text_dim`` is its width).
    """
    source = recipe.source
    assert isinstance(source, ParquetSource)
    path, family = find_model(recipe.model.path), find_family(recipe)
    statistics, num_frames = family.latent_statistics(path), _latent_size(recipe)[0]
    stems = [name for name in columns if name != DERIVED]
    for file, rows in _runs(clips):
        for tensors in read_tensors(source.path, file, rows, only=stems):
            text = family.upstream_text(path, tensors.pop("text_embedding"))
            if text_dim not in (None, text.embedding.shape[-1]):
                raise UserError(
                    f"{source.path / file}: its text embeddings are {text.embedding.shape[-1]} "
                    f"wide, those of {recipe.model.path} are {text_dim}; use the model that the "
                    "files were made with"
                )
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
        self._raw: list[float] = []
        self._normalised: list[float] = []

    def see(self, raw_CTYX: "Tensor") -> None:
        """Take a raw latent into account."""
        normalised = self._statistics.normalise(raw_CTYX.float())
        self._raw.append(_spread(raw_CTYX.float()))
        self._normalised.append(_spread(normalised))

    def report(self) -> None:
        """Log what was seen, and warn if the other reading fits better."""
        if not self._raw:
            return
        raw, normalised = (sum(seen) / len(seen) for seen in (self._raw, self._normalised))
        said = "raw VAE output" if self._source.latents == "raw" else "already normalised"
        logger.info(
            "%s: latents were taken as %s; normalised with the model's latents_mean and "
            "latents_std, as training does, they have a standard deviation of %.2f per channel "
            "(1 is right)",
            self._source.path,
            said,
            normalised,
        )
        if self._source.latents == "raw" and abs(raw - 1) < abs(normalised - 1) / 2:
            logger.warning(
                "%s: as they are stored the latents have a standard deviation of %.2f: they look "
                "normalised already; if so, set source.latents: normalised",
                self._source.path,
                raw,
            )


def _spread(latent_CTYX: "Tensor") -> float:
    """Root of the mean square per channel, without the mean: a video's mean is far from 0."""
    return float(latent_CTYX.flatten(1).std(dim=1).mean())


# ---------------------------------------------------------------- listing

_Stamp = tuple[int, int]


def _listed(root: Path, store: ShardStore) -> list[tuple[Path, list[tuple[StoredClip, _Stamp]]]]:
    """All files with their rows; a file that is as it was is not read again."""
    known = _read_journal(store.listed)
    files = parquet_files(root)
    progress = Progress("files", total=len(files))
    store.root.mkdir(parents=True, exist_ok=True)
    found = []
    with open(store.listed, "a", encoding="utf-8") as journal:
        for file in files:
            status = (root / file).stat()
            stamp = (status.st_size, status.st_mtime_ns)
            clips = known.get((file.as_posix(), *stamp))
            if clips is None:
                clips = read_clips(root, file)
                journal.write(_line(file, stamp, clips))
                journal.flush()
            found.append((file, [(clip, stamp) for clip in clips]))
            progress.advance(str(file))
    progress.close()
    return found


def _line(file: Path, stamp: _Stamp, clips: Sequence[StoredClip]) -> str:
    plain = [{**vars(clip), "tensors": sorted(clip.tensors)} for clip in clips]
    return json.dumps({"file": file.as_posix(), "stamp": stamp, "clips": plain}) + "\n"


def _read_journal(path: Path) -> dict[tuple[str, int, int], list[StoredClip]]:
    """What is known; a line that a kill cut short is left out."""
    known = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            known[(entry["file"], *entry["stamp"])] = [_clip(clip) for clip in entry["clips"]]
    return known


def _clip(plain: dict[str, Any]) -> StoredClip:
    lists = {key: tuple(plain[key]) for key in ("latent_shape", "text_shape")}
    fault = tuple(plain["fault"]) if plain["fault"] else None
    return StoredClip(**{**plain, **lists, "tensors": frozenset(plain["tensors"]), "fault": fault})


# ---------------------------------------------------------------- judging


def _latent_size(recipe: Recipe) -> tuple[int, int, int]:
    """(T, Y, X) of the recipe's clips."""
    clip, facts = recipe.clip, recipe.architecture
    return (
        (clip.num_frames - 1) // facts.temporal_stride + 1,
        clip.height // facts.spatial_stride,
        clip.width // facts.spatial_stride,
    )


def _problem(
    clip: StoredClip, *, wanted: tuple[int, int, int], columns: Sequence[str]
) -> tuple[Any, str, str] | None:
    missing = [name for name in columns if name != DERIVED and name not in clip.tensors]
    if missing:
        reason, detail = clip.fault or (f"no_{missing[0]}", f"{missing[0]} is empty")
        return "failed", reason, detail
    _, num_frames, *size = clip.latent_shape
    if tuple(size) != wanted[1:]:
        detail = f"its latent is {list(clip.latent_shape)}, the recipe's is {list(wanted)}"
        return "filtered", "other_size", detail
    if num_frames < wanted[0]:
        return "filtered", "too_short", f"{num_frames} latent frames, {wanted[0]} are needed"
    if not clip.caption.strip():
        return "filtered", "no_caption", "its caption is empty"
    return None


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
    return ClipRow(
        item=index,
        id=name,
        path=f"{clip.file}#{clip.row}",
        captions=(clip.caption,),
        split=seeded_split(name, source=source),
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
        num_frames=max(0, clip.num_latent_frames - 1) * stride + 1,
        duration_s=clip.duration_s,
        rotation=0,
        codec="parquet",
    )


def _runs(clips: Sequence[ClipRow]) -> Iterator[tuple[str, list[int]]]:
    """Neighbouring clips of one file with ascending rows, to be read in one go."""
    places = [(file, int(row)) for file, _, row in (c.path.rpartition("#") for c in clips)]
    starts = [
        i
        for i, (file, row) in enumerate(places)
        if i == 0 or file != places[i - 1][0] or row <= places[i - 1][1]
    ]
    for start, end in itertools.pairwise([*starts, len(places)]):
        yield places[start][0], [row for _, row in places[start:end]]
