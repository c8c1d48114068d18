# SPDX-License-Identifier: Apache-2.0
"""Bytes on disk: checkpoints, the export and the shards."""

import math
from collections.abc import Mapping
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.cost.memory import parameter_counts, state_of
from fastvideo.cost.transformer import is_hunyuan, latent_shape, tokens_of, trained_parameters

CAPTION_TOKENS = 128
"""Assumed length of a caption; text is stored without padding."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoint_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """One checkpoint of one transformer: what trains, its running means and its average."""
    parameters = parameter_counts(recipe, config, spread=False)
    return state_of(parameters, recipe.train, shard=1).saved


def checkpoint_count(recipe: Recipe) -> int:
    """The most of them at one time: those that are kept, and one that is being written."""
    spec, steps = recipe.train.checkpoint, recipe.train.steps
    # Only what is saved stays: of steps that both numbers divide, or of any by the clock.
    saved_every = spec.every_steps if spec.every_minutes is None else 1
    stay = steps // math.lcm(spec.keep_every, saved_every) if spec.keep_every else 0
    written = math.ceil(steps / spec.every_steps)
    return (
        min(spec.keep_last + 1 + stay, written)
        if spec.every_minutes is None
        else (spec.keep_last + 1 + stay)
    )


def export_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """What was trained of one transformer in ``export.dtype``: all its weights, or a LoRA file.

    The other parts of a model are links or copies.
    """
    return BYTES[recipe.export.dtype] * trained_parameters(recipe, config)


def sample_bytes(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Tensors of a clip in a shard, with a caption of `CAPTION_TOKENS`."""
    size = BYTES[recipe.shards.dtype]
    text = 4 if recipe.shards.dtype == "float32" else BYTES[recipe.shards.text_dtype]
    latent = math.prod(latent_shape(recipe)) * int(config["out_channels"])
    if is_hunyuan(recipe.model.family):
        words = CAPTION_TOKENS * config["text_embed_dim"] + config["pooled_projection_dim"]
        return size * latent + text * int(words)
    if config["in_channels"] > 2 * config["out_channels"]:  # the first frame's latent beside it
        latent *= 2
    picture = tokens_of(recipe, config).image * (config.get("image_dim") or 0)
    return size * (latent + int(picture)) + text * CAPTION_TOKENS * int(config["text_dim"])
