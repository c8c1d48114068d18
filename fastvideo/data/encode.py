# SPDX-License-Identifier: Apache-2.0
"""Clips and prompts through the encoders into Parquet: the part of preprocessing that needs torch.

Axes: F pixel frames, H, W pixels, C channels, L text tokens, D text dimension.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.config.recipe import Recipe
from fastvideo.config.source import ParquetSource
from fastvideo.data.adopt import Adopted, Normalisation, adopted
from fastvideo.data.decode_ahead import Decoded, Frames, decode_ahead
from fastvideo.data.first_image import PromptToEncode, first_image
from fastvideo.data.footage import Planned
from fastvideo.data.judge import ClipRow
from fastvideo.data.listing import open_footage
from fastvideo.data.manifest import read_rows, shard_fingerprint
from fastvideo.data.shard import (
    PROMPT_SCHEMA,
    Contents,
    Row,
    cast,
    shard_schema,
    text_tensors,
    write_shard,
)
from fastvideo.errors import Failed, UserError
from fastvideo.log import Progress, logger
from fastvideo.models.family import (
    Encoders,
    EncoderSettings,
    LatentStatistics,
    Text,
    find_family,
    pick_device,
)
from fastvideo.models.folder import find_model
from fastvideo.state import ShardStore


def load_encoders(recipe: Recipe) -> Encoders:
    """Load VAE and text encoder on the device of ``recipe.preprocess``."""
    settings = EncoderSettings(
        vae_dtype=recipe.shards.vae_dtype,
        text_dtype=recipe.shards.text_dtype,
        device=pick_device(recipe.preprocess.device),
    )
    return find_family(recipe).load_encoders(find_model(recipe.model.path), settings=settings)


def fill_shards(
    recipe: Recipe,
    store: ShardStore,
    plan: dict[str, Any],
    *,
    missing: Sequence[int],
    encoders: Encoders,
) -> None:
    """Encode the missing shards one after the other while workers decode ahead.

    Raises:
        UserError: The manifest is not the plan's any more, or a video changed since.
    """
    rows = {index: _planned_rows(store, plan, index) for index in missing}
    clips = list(itertools.chain.from_iterable(rows.values()))
    logger.info("encoding %d clips into %d shards", len(clips), len(missing))
    progress = Progress("clips", total=len(clips))
    videos = _planned_videos(recipe, clips)
    decoded = decode_ahead(videos, clip=recipe.clip, workers=recipe.preprocess.decode_workers)
    with contextlib.closing(decoded), contextlib.closing(progress):
        for index in missing:
            failed: list[dict[str, str]] = []
            pairs = _pairs(rows[index], decoded)
            write_shard(
                store.shard(index),
                _encode(recipe, pairs, encoders=encoders, failed=failed, progress=progress),
                schema=shard_schema(plan["settings"]["columns"]),
                contents=Contents(plan["shards"][str(index)]["fingerprint"], plan["settings"]),
                failed=failed,
                point="shard",
            )


def _pairs(
    clips: Iterable[ClipRow], decoded: Iterator[Decoded]
) -> Iterator[tuple[ClipRow, Decoded]]:
    for clip in clips:
        try:
            result = next(decoded)
        except OSError as error:
            raise _unreadable(clip, error) from error
        yield clip, result


def _unreadable(clip: ClipRow, error: OSError) -> UserError | Failed:
    """The machine is to blame, not the clip, unless it is a matter of the paths."""
    told = f"shard {clip.shard}, clip {clip.id!r}: {error}"
    if isinstance(error, (NotADirectoryError, IsADirectoryError, PermissionError)):
        return UserError(f"{told}; check the paths of the recipe")
    return Failed(f"{told}; not the clip is to blame but the disk or the network: try again")


def _planned_videos(recipe: Recipe, clips: Sequence[ClipRow]) -> Iterator[Planned]:
    """What to decode, read no further than it is asked for."""
    source = recipe.source
    assert not isinstance(source, ParquetSource)
    contents = open_footage(source).read(clip.origin for clip in clips)
    for clip in clips:
        try:
            content = next(contents)
        except OSError as error:
            raise _unreadable(clip, error) from error
        name = str(content) if isinstance(content, Path) else f"{source.path}/{clip.origin}"
        yield Planned(name, content, (clip.bytes, clip.mtime_ns), clip.sha256)


def adopt_shards(
    recipe: Recipe, store: ShardStore, plan: dict[str, Any], *, missing: Sequence[int]
) -> None:
    """Write the missing shards from the rows of a Parquet source.

    Raises:
        UserError: The manifest is not the plan's any more, or a file changed since.
    """
    settings, source = plan["settings"], recipe.source
    assert isinstance(source, ParquetSource)
    columns = settings["columns"]
    statistics = LatentStatistics(tuple(settings["latents_mean"]), tuple(settings["latents_std"]))
    seen = Normalisation(source, statistics)
    rows = {index: _planned_rows(store, plan, index) for index in missing}
    with contextlib.closing(Progress("clips", total=sum(map(len, rows.values())))) as progress:
        for index in missing:
            found = adopted(recipe, rows[index], columns=columns)
            write_shard(
                store.shard(index),
                _adopt(recipe, zip(rows[index], found, strict=True), seen, progress),
                schema=shard_schema(columns),
                contents=Contents(plan["shards"][str(index)]["fingerprint"], settings),
                point="shard",
            )
    seen.report()


def _adopt(
    recipe: Recipe,
    found: Iterable[tuple[ClipRow, Adopted]],
    seen: Normalisation,
    progress: Progress,
) -> Iterator[Row]:
    for clip, given in found:
        seen.see(given.tensors["vae_latent"])
        latents = _cast(recipe, given.tensors, name=clip.id)
        tensors = {**latents, **_texts(recipe, [given.text])}
        values = _values(recipe, clip, latents["vae_latent"], [given.text])
        yield Row(tensors, {**values, "file_name": clip.id})  # clip.path is that of the Parquet
        progress.advance(clip.id)


def _planned_rows(store: ShardStore, plan: dict[str, Any], index: int) -> list[ClipRow]:
    """Rows of a shard, which must be those its fingerprint was made of."""
    rows = read_rows(store, index)
    if shard_fingerprint(plan["settings"], rows) != plan["shards"][str(index)]["fingerprint"]:
        raise UserError(f"{store.manifest}: was planned anew meanwhile; run the same command again")
    return rows


def write_prompts(
    recipe: Recipe,
    store: ShardStore,
    prompts: Sequence[PromptToEncode],
    *,
    contents: Contents,
    encoders: Encoders,
) -> None:
    """Encode prompts and their first images into ``validation.parquet``."""
    logger.info("encoding %d prompts", len(prompts))
    rows = (_prompt_row(recipe, i, prompt, encoders) for i, prompt in enumerate(prompts))
    write_shard(store.validation, rows, schema=PROMPT_SCHEMA, contents=contents, point="prompts")


def _prompt_row(recipe: Recipe, index: int, prompt: PromptToEncode, encoders: Encoders) -> Row:
    texts = encoders.encode_text([prompt.caption])
    tensors = _texts(recipe, texts)
    if prompt.image is not None:
        size = {"height": prompt.height, "width": prompt.width}
        image_HWC = first_image(prompt.image, **size)
        found = encoders.encode_image(image_HWC, num_frames=prompt.num_frames)
        tensors |= _cast(recipe, found, name=f"prompt {index}")
        pixels_CHW = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)
        tensors["pil_image"] = pixels_CHW.float() if _all_float32(recipe) else pixels_CHW
    return Row(tensors, {"id": f"prompt-{index}", **prompt.values})


def _encode(
    recipe: Recipe,
    decoded: Iterable[tuple[ClipRow, Decoded]],
    *,
    encoders: Encoders,
    failed: list[dict[str, str]],
    progress: Progress,
) -> Iterator[Row]:
    """Yield the rows of one shard; faulty clips go to ``failed``."""
    for clip, result in decoded:
        if result.frames is None:
            assert result.fault is not None
            reason, detail = result.fault
            failed.append({"id": clip.id, "reason": reason, "detail": clip.located(detail)})
        else:
            try:
                row = _row(recipe, clip, result.frames, encoders)
            except Exception as error:  # out of memory, say; goes on
                error.add_note(f"shard {clip.shard}, clip {clip.id!r}")
                raise
            yield row
        progress.advance(clip.id)


def _row(recipe: Recipe, clip: ClipRow, frames_FHWC: Frames, encoders: Encoders) -> Row:
    latents = _cast(recipe, encoders.encode_video(frames_FHWC), name=clip.id)
    texts = encoders.encode_text(clip.captions)
    values = _values(recipe, clip, latents["vae_latent"], texts)
    return Row({**latents, **_texts(recipe, texts)}, values)


def _values(
    recipe: Recipe, clip: ClipRow, latent_CTYX: Tensor, texts: Sequence[Text]
) -> dict[str, Any]:
    return {
        "id": clip.id,
        "file_name": Path(clip.id).name,
        "caption": clip.captions[0],
        "media_type": "video",
        "width": recipe.clip.width,
        "height": recipe.clip.height,
        "num_frames": latent_CTYX.shape[1],
        "duration_sec": recipe.clip.num_frames / recipe.clip.fps,
        "fps": recipe.clip.fps,
        "more_text_lengths": [len(text.embedding) for text in texts[1:]],
        "more_captions": list(clip.captions[1:]),
    }


def _cast(recipe: Recipe, found: Mapping[str, Tensor], *, name: str) -> dict[str, Tensor]:
    return {key: cast(t, recipe.shards.dtype, clip=name) for key, t in found.items()}


def _texts(recipe: Recipe, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Text keeps the encoder's dtype, unless all tensors are asked for in float32."""
    tensors = text_tensors(texts)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name}: the text encoder made values that are not finite; set "
                "shards.text_dtype: float32, or fetch the model again"
            )
    return {k: t.float() for k, t in tensors.items()} if _all_float32(recipe) else tensors


def _all_float32(recipe: Recipe) -> bool:
    return recipe.shards.dtype == "float32"
