# SPDX-License-Identifier: Apache-2.0
"""A transformer and what one sample of a recipe gives it, from its config.json of diffusers."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fastvideo.config.architectures import architecture, releases
from fastvideo.config.recipe import Recipe
from fastvideo.cost import hunyuan, wan
from fastvideo.cost.layers import Layers, Tokens


def parameters(config: Mapping[str, Any], family: str) -> int:
    """Count the numbers that a full finetune trains."""
    return sum(layers(config, family, Tokens(video=1, text=1)).sizes().values())


def layers(config: Mapping[str, Any], family: str, tokens: Tokens) -> Layers:
    """Return the layers of a transformer of ``family``; their rows are those of ``tokens``."""
    return _layers(json.dumps(config), family, tokens)


@lru_cache(maxsize=64)
def _layers(config: str, family: str, tokens: Tokens) -> Layers:
    build = hunyuan.layers if is_hunyuan(family) else wan.layers
    return build(json.loads(config), tokens)


def is_hunyuan(family: str) -> bool:
    """Whether the transformer is HunyuanVideo's; the others are Wan's."""
    return family == "hunyuan-video"


def tokens_of(recipe: Recipe, config: Mapping[str, Any], *, batch: int = 1) -> Tokens:
    """Count the tokens of a sample; text is padded to the length of the model's pipeline."""
    facts = recipe.architecture
    frames = _latent_frames(recipe) // facts.patch_size[0]
    per_frame = 1
    for pixels, patch in zip(
        (recipe.clip.height, recipe.clip.width), facts.patch_size[1:], strict=True
    ):
        per_frame *= pixels // (facts.spatial_stride * patch)
    return Tokens(
        video=frames * per_frame,
        text=facts.text_tokens,
        image=_image_tokens(recipe.model.family) if config.get("image_dim") else 0,
        runs=frames if _has_frame_timesteps(recipe.model.family) else 1,
        batch=batch,
    )


def tokens_per_sample(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Count the video tokens of a sample, the S of the transformer's blocks."""
    return tokens_of(recipe, config).video


def latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(T, Y, X) of a clip's latent."""
    stride = architecture(recipe.model.family).spatial_stride
    return (_latent_frames(recipe), recipe.clip.height // stride, recipe.clip.width // stride)


def _latent_frames(recipe: Recipe) -> int:
    return (recipe.clip.num_frames - 1) // recipe.architecture.temporal_stride + 1


def _image_tokens(family: str) -> int:
    """Tokens of CLIP's picture of the first frame."""
    encoders = (r.image_encoder for r in releases() if r.family == family)
    return next(int(encoder["num_tokens"]) for encoder in encoders if encoder)


def _has_frame_timesteps(family: str) -> bool:
    """TI2V-5B has a timestep for each token, which differ between latent frames only."""
    return family == "wan2.2-ti2v-5b"
