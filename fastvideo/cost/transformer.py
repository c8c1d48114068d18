# SPDX-License-Identifier: Apache-2.0
"""A transformer and what one sample of a recipe gives it, from its config.json of diffusers."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fastvideo.config.architectures import architecture, releases
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Full, Lora
from fastvideo.cost import hunyuan, wan
from fastvideo.cost.adapters import adapted, is_up
from fastvideo.cost.layers import Layers, Tokens

FULL = Full()
ONE = Tokens(video=1, text=1)
"""Where only the parameters count."""


def parameters(config: Mapping[str, Any], family: str) -> int:
    """Count the numbers of a transformer, without adapters."""
    return sum(layers(config, family, ONE).sizes().values())


def trained_parameters(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Count the numbers that train."""
    return sum(trained_layers(recipe, config, ONE).trained.sizes().values())


def count_adapters(recipe: Recipe, config: Mapping[str, Any]) -> int:
    """Count the projections that get an adapter; none in a full finetune."""
    return sum(is_up(linear) for linear in trained_layers(recipe, config, ONE).linears)


def layers(
    config: Mapping[str, Any], family: str, tokens: Tokens, *, method: Full | Lora = FULL
) -> Layers:
    """Return the layers of a transformer of ``family``; their rows are those of ``tokens``.

    Raises:
        UserError: ``method.targets`` match nothing.
    """
    return _layers(json.dumps(config), family, tokens, method)


def trained_layers(recipe: Recipe, config: Mapping[str, Any], tokens: Tokens) -> Layers:
    """Return the layers of a transformer as the recipe trains it."""
    return layers(config, recipe.model.family, tokens, method=recipe.train.method)


@lru_cache(maxsize=64)
def _layers(config: str, family: str, tokens: Tokens, method: Full | Lora) -> Layers:
    build = hunyuan.layers if is_hunyuan(family) else wan.layers
    found = build(json.loads(config), tokens)
    return adapted(found, method) if isinstance(method, Lora) else found


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
