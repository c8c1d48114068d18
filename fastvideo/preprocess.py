# SPDX-License-Identifier: Apache-2.0
"""Raw videos to shards: plan the manifest, fill the shards that are missing, encode the prompts."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

from fastvideo import hashing, state
from fastvideo.config.recipe import Recipe
from fastvideo.config.source import ParquetSource
from fastvideo.data.decode import DECODE_SETTINGS
from fastvideo.data.manifest import plan_manifest
from fastvideo.data.prompts import prompts_fingerprint, prompts_to_encode
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.models.family import ENCODE_VERSION, find_family
from fastvideo.models.folder import content_hash, find_model
from fastvideo.state import LedgerRow, ShardStore


def preprocess(
    recipe: Recipe, *, shards: Sequence[int] | None = None, manifest_only: bool = False
) -> dict[str, Any]:
    """Fill what is missing in ``recipe.shards.path``.

    Args:
        recipe: Model, clip, source and shards matter.
        shards: Only these, of a manifest that is planned already; None plans and fills all.
        manifest_only: Plan and stop.

    Returns:
        ``{"filled": [index, ...], "missing": [...], "clips": {...}}``.

    Raises:
        UserError: Wrong input, or more clips failed than ``source.max_failed`` allows.
    """
    store = ShardStore(recipe.shards.path)
    prompts = prompts_to_encode(recipe) if shards is None else []
    settings = encoding_settings(recipe, hashes=hashing.HashCache(store.hashes))
    if shards is None:
        plan = plan_manifest(recipe, store=store, settings=settings)
    else:
        plan = _planned(store, settings=settings, shards=shards)
    wanted = state.shard_indices(plan) if shards is None else sorted(set(shards))
    missing = [i for i in state.missing_shards(store, plan) if i in wanted]
    if manifest_only:
        return _result(store, plan, filled=[])
    if shards is None and not plan["shards"]:
        _check_failures(recipe, store, plan)  # before encoders are loaded for nothing
    wanted_prompts = prompts_fingerprint(settings, prompts)
    prompts_done = state.read_marker(store.validation, fingerprint=wanted_prompts) or not prompts
    if missing or not prompts_done:
        # Only now: a run with nothing to do answers without torch.
        from fastvideo.data import encode
        from fastvideo.data.shard import Contents

        encoders = functools.cache(lambda: encode.load_encoders(recipe))
        if not prompts_done:
            contents = Contents(wanted_prompts, settings)
            encode.write_prompts(recipe, store, prompts, contents=contents, encoders=encoders())
        if missing and isinstance(recipe.source, ParquetSource):
            encode.adopt_shards(recipe, store, plan, missing=missing)
        elif missing:
            encode.fill_shards(recipe, store, plan, missing=missing, encoders=encoders())
    if shards is None:
        _check_failures(recipe, store, plan)
    return _result(store, plan, filled=missing)


def encoding_settings(recipe: Recipe, *, hashes: hashing.HashCache) -> dict[str, Any]:
    """Everything that decides the bytes of a shard apart from its clips; plain values."""
    path = find_model(recipe.model.path)
    family = find_family(recipe)
    family.check(path)
    statistics = family.latent_statistics(path)
    encoders = {
        part: {str(file.relative_to(path)): content_hash(file, hashes) for file in files}
        for part, files in family.encoder_parts(path).items()
    }
    return {
        "schema": state.SCHEMA_VERSION,
        "family": recipe.model.family,
        "columns": list(family.columns(path)),
        "clip": recipe.clip.model_dump(mode="json"),
        "decode": _decode_settings(recipe),
        "encode": {"version": ENCODE_VERSION},
        "dtype": recipe.shards.dtype,
        "vae_dtype": recipe.shards.vae_dtype,
        "text_dtype": recipe.shards.text_dtype,
        "latents_mean": list(statistics.mean),
        "latents_std": list(statistics.std),
        "encoders": encoders,
    }


def _decode_settings(recipe: Recipe) -> dict[str, Any]:
    if isinstance(recipe.source, ParquetSource):
        return {"backend": "upstream parquet", "latents": recipe.source.latents}
    return DECODE_SETTINGS


def _planned(
    store: ShardStore, *, settings: dict[str, Any], shards: Sequence[int]
) -> dict[str, Any]:
    plan = store.read_plan()
    if plan is None:
        raise UserError(f"{store.plan}: there is no manifest; run preprocess --manifest-only first")
    if plan["settings"] != settings:
        raise UserError(
            f"{store.plan}: was planned with other settings than this recipe's; run preprocess "
            "--manifest-only again"
        )
    unknown = [i for i in shards if str(i) not in plan["shards"]]
    if unknown:
        raise UserError(
            f"--shards {state.shorten(unknown)}: the manifest has the shards "
            f"{state.shorten(state.shard_indices(plan))}"
        )
    return plan


def _result(store: ShardStore, plan: dict[str, Any], *, filled: list[int]) -> dict[str, Any]:
    counts = collections.Counter(row.state for row in state.ledger(store, plan))
    missing = state.missing_shards(store, plan)
    return {"filled": filled, "missing": missing, "clips": dict(counts)}


def _most_common(failed: Sequence[LedgerRow]) -> str:
    return collections.Counter(row.reason for row in failed).most_common(1)[0][0]


def _check_failures(recipe: Recipe, store: ShardStore, plan: dict[str, Any]) -> None:
    rows = list(state.ledger(store, plan))
    failed = [row for row in rows if row.state == "failed"]
    for row in failed:
        logger.warning("clip %r failed: %s: %s", row.id, row.reason, row.detail)
    if len(failed) > recipe.source.max_failed * len(rows):
        raise UserError(
            f"{len(failed)} of {len(rows)} clips failed, most often {_most_common(failed)}, more "
            f"than source.max_failed={recipe.source.max_failed:g}; see `fastvideo status --clips`, "
            "repair or remove them, or raise the limit"
        )
    if not any(row.state == "encoded" for row in rows):
        reasons = collections.Counter(f"{row.state}: {row.reason}" for row in rows)
        raise UserError(
            f"{recipe.source.path}: not one of {len(rows)} clips can be used "
            f"({', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}); see "
            "`fastvideo status --clips`"
        )
