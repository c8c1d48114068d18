# SPDX-License-Identifier: Apache-2.0
"""Whether shards, model and recipe go together, before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvideo import hashing, state
from fastvideo.config.lora import targets
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.cost.adapters import projections
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers
from fastvideo.data.prompts import check_encoded
from fastvideo.errors import UserError
from fastvideo.models.family import find_family
from fastvideo.models.folder import content_hash, files_of, find_model, read_config
from fastvideo.state import ShardStore
from fastvideo.trained import model_facts, newest_of


def facts(recipe: Recipe, store: ShardStore, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What decides the result beside the recipe, by transformer; kept in each checkpoint.

    Raises:
        UserError: Shards and model do not go together, or not with the recipe.
    """
    path = find_model(recipe.model.path)
    family = find_family(recipe)
    family.check(path)
    _check_shards(recipe, store, plan["settings"], columns=family.columns(path))
    _check_encoders(path, store, plan["settings"])
    shared = {
        "clips": state.data_fingerprint(store, plan),
        "shift": recipe.train.timesteps.shift or family.flow_shift(path),
        "settings": recipe.train.method.model_dump(mode="json"),
    }
    return {
        name: {**model_facts(recipe, path, transformer=name), **shared}
        for name in recipe.transformers
    }


def check_samples(recipe: Recipe, store: ShardStore, plan: dict[str, Any] | None) -> None:
    """Prompts must be encoded, the VAE at hand, and the other expert one of this model."""
    if recipe.train.samples is None:
        return
    assert plan is not None
    check_encoded(recipe, store, plan["settings"])
    base = find_model(recipe.model.path)
    files_of(base, "vae", "scheduler")
    for transformer in recipe.architecture.transformers:
        if transformer not in recipe.transformers:
            newest_of(recipe, base, transformer=transformer)


def check_targets(recipe: Recipe, path: Path) -> None:
    """Every pattern for adapters must match a projection of the model at ``path``."""
    method = recipe.train.method
    if isinstance(method, Lora):
        for transformer in recipe.transformers:
            config = read_config(path, f"{transformer}/config.json")
            found = layers(config, recipe.model.family, Tokens(video=1, text=1))
            targets(method, projections(found))


def _check_shards(
    recipe: Recipe, store: ShardStore, settings: dict[str, Any], *, columns: Sequence[str]
) -> None:
    """The shards must be what this recipe would make, as far as their settings tell."""
    wanted = {
        "family": recipe.model.family,
        "clip": recipe.clip.model_dump(mode="json"),
        "dtype": recipe.shards.dtype,
        "vae_dtype": recipe.shards.vae_dtype,
        "text_dtype": recipe.shards.text_dtype,
    }
    for key, value in wanted.items():
        if settings[key] != value:
            raise UserError(
                f"{store.root}: was encoded with {key} {settings[key]!r}, the recipe says "
                f"{value!r}; run preprocess, or use the recipe the shards were made with"
            )
    made, said = settings["decode"].get("latents"), getattr(recipe.source, "latents", None)
    if made != said:
        raise UserError(
            f"{store.root}: was made with source.latents {made!r}, the recipe says {said!r}; run "
            "preprocess, or use the recipe the shards were made with"
        )
    missing = [name for name in columns if name not in settings["columns"]]
    if missing:
        raise UserError(
            f"{store.root}: holds no {' and no '.join(missing)}, which {recipe.model.path} is "
            f"conditioned on as {recipe.model.task}; run preprocess with this recipe, or use the "
            "model the shards were made for"
        )


PARTS = {"vae": "VAE", "text": "text encoder", "image": "image encoder"}


def _check_encoders(path: Path, store: ShardStore, settings: dict[str, Any]) -> None:
    """Where the model's encoders are at hand, they must be those the shards were encoded with.

    Of the VAE every file counts; of the others, which may be tens of GB, the configs.
    """
    hashes = hashing.HashCache(store.hashes)
    for part, files in settings["encoders"].items():
        for name, sha256 in files.items():
            file = path / name
            looked_at = file.is_file() and (part == "vae" or file.suffix == ".json")
            if looked_at and content_hash(file, hashes) != sha256:
                raise UserError(
                    f"{store.root}: was encoded with another {PARTS[part]} than {file}; "
                    "run preprocess, or use the model.path the shards were made with"
                )
