# SPDX-License-Identifier: Apache-2.0
"""Clips and prompts through the encoders into Parquet: the part of preprocessing that needs torch.

Axes: F pixel frames, H, W pixels, C channels, L text tokens, D text dimension.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.config.recipe import Recipe
from fastvideo.data.decode_ahead import Decoded, Frames, VideoFile, decode_ahead
from fastvideo.data.manifest import ClipRow, read_rows, shard_fingerprint
from fastvideo.data.shard import PROMPT_SCHEMA, SHARD_SCHEMA, Contents, Row, cast, write_shard
from fastvideo.errors import UserError
from fastvideo.log import Progress, logger
from fastvideo.models.family import Encoders, EncoderSettings, find_family, find_model, pick_device
from fastvideo.state import ShardStore


def load_encoders(recipe: Recipe) -> Encoders:
    """Load VAE and text encoder on the device of ``recipe.preprocess``."""
    settings = EncoderSettings(
        vae_dtype=recipe.shards.vae_dtype,
        text_dtype=recipe.shards.text_dtype,
        device=pick_device(recipe.preprocess.device),
    )
    path = find_model(recipe.model.path)
    return find_family(recipe.model.family).load_encoders(path, settings=settings)


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
    videos = recipe.source.path / "videos"
    files = [VideoFile(videos / clip.path, clip.bytes, clip.mtime_ns) for clip in clips]
    decoded = decode_ahead(files, clip=recipe.clip, workers=recipe.preprocess.decode_workers)
    with contextlib.closing(decoded), contextlib.closing(progress):
        for index in missing:
            failed: list[dict[str, str]] = []
            pairs = zip(rows[index], decoded, strict=False)
            write_shard(
                store.shard(index),
                _encode(recipe, pairs, encoders=encoders, failed=failed, progress=progress),
                schema=SHARD_SCHEMA,
                contents=Contents(plan["shards"][str(index)]["fingerprint"], plan["settings"]),
                failed=failed,
                point="shard",
            )


def _planned_rows(store: ShardStore, plan: dict[str, Any], index: int) -> list[ClipRow]:
    """Rows of a shard, which must be those its fingerprint was made of."""
    rows = read_rows(store, index)
    if shard_fingerprint(plan["settings"], rows) != plan["shards"][str(index)]["fingerprint"]:
        raise UserError(f"{store.manifest}: was planned anew meanwhile; run the same command again")
    return rows


def write_prompts(
    recipe: Recipe,
    store: ShardStore,
    captions: Sequence[str],
    *,
    contents: Contents,
    encoders: Encoders,
) -> None:
    """Encode prompts into ``validation.parquet``."""
    logger.info("encoding %d prompts", len(captions))
    embeddings = [_text(recipe, text) for text in encoders.encode_text(captions)]
    rows = [
        Row({"text_embedding": text}, {"id": f"prompt-{i}", "caption": caption})
        for i, (caption, text) in enumerate(zip(captions, embeddings, strict=True))
    ]
    write_shard(store.validation, rows, schema=PROMPT_SCHEMA, contents=contents, point="prompts")


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
            failed.append({"id": clip.id, "reason": reason, "detail": detail})
        else:
            yield _row(recipe, clip, result.frames, encoders)
        progress.advance(clip.id)


def _row(recipe: Recipe, clip: ClipRow, frames_FHWC: Frames, encoders: Encoders) -> Row:
    latents = {
        name: cast(tensor, recipe.shards.dtype, clip=clip.id)
        for name, tensor in encoders.encode_video(frames_FHWC).items()
    }
    first, *more = (_text(recipe, text) for text in encoders.encode_text(clip.captions))
    tensors = {**latents, "text_embedding": first}
    if more:
        tensors["more_text_embeddings"] = torch.cat(more)
    values = {
        "id": clip.id,
        "file_name": Path(clip.path).name,
        "caption": clip.captions[0],
        "media_type": "video",
        "width": recipe.clip.width,
        "height": recipe.clip.height,
        "num_frames": latents["vae_latent"].shape[1],
        "duration_sec": recipe.clip.num_frames / recipe.clip.fps,
        "fps": recipe.clip.fps,
        "more_text_lengths": [len(text) for text in more],
        "more_captions": list(clip.captions[1:]),
    }
    return Row(tensors, values)


def _text(recipe: Recipe, embedding_LD: Tensor) -> Tensor:
    """Text keeps the encoder's dtype, unless all tensors are asked for in float32."""
    return embedding_LD.float() if recipe.shards.dtype == "float32" else embedding_LD
