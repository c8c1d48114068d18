# SPDX-License-Identifier: Apache-2.0
"""Raw videos to shards: plan the manifest, fill the shards that are missing, encode the prompts."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastvideo import hashing, state
from fastvideo.config.recipe import Recipe
from fastvideo.config.source import ParquetSource
from fastvideo.data.decode import DECODE_SETTINGS
from fastvideo.data.fill import Filling
from fastvideo.data.manifest import plan_manifest
from fastvideo.data.prompts import prompts_to_encode
from fastvideo.errors import UserError, measuring
from fastvideo.log import logger
from fastvideo.models.family import ENCODE_VERSION, find_family
from fastvideo.models.folder import content_hash, find_model
from fastvideo.state import LedgerRow, ShardStore


def preprocess(
    recipe: Recipe,
    *,
    shards: Sequence[int] | None = None,
    every: tuple[int, int] | None = None,
    manifest_only: bool = False,
) -> dict[str, Any]:
    """Fill what is missing in ``recipe.shards.path``.

    Several processes may fill parts of a planned manifest at the same time, anywhere. One of those
    that find the prompts not encoded encodes them, and whoever leaves no shard missing judges
    whether too many clips failed.

    Args:
        recipe: Model, clip, source, shards and validation matter.
        shards: Only these, of a manifest that is planned already; None plans and fills all.
        every: ``(rest, count)``: only those whose number leaves ``rest`` when divided by ``count``,
            of a manifest that is planned already.
        manifest_only: Plan and stop.

    Returns:
        ``{"filled": [index, ...], "missing": [...], "clips": {...}}``; of the shards asked for.

    Raises:
        UserError: Wrong input, or more clips failed than ``source.max_failed`` allows.
        Failed: The machine, not the input, ended it.
    """
    assert every is None or 0 <= every[0] < every[1]
    store = ShardStore(recipe.shards.path)
    chosen = _Chosen(shards, every)
    with measuring(lambda: _progress(store, chosen)):
        prompts = prompts_to_encode(recipe)
        settings = encoding_settings(recipe, hashes=hashing.HashCache(store.hashes))
        if chosen.all:
            plan = plan_manifest(recipe, store=store, settings=settings)
        else:
            plan = _planned(store, settings=settings, shards=shards or ())
        if manifest_only:
            return _result(store, plan, chosen, filled=[])
        if not plan["shards"]:
            _check_failures(recipe, store, plan)  # before encoders are loaded for nothing
        missing = chosen.missing(store, plan)
        filling = Filling(recipe, store, plan, prompts)
        filling.fill(missing)
        if not state.missing_shards(store, plan):
            filling.ensure_prompts()
            _check_failures(recipe, store, plan)
        return _result(store, plan, chosen, filled=missing)


@dataclass(frozen=True)
class _Chosen:
    """The shards that are asked for."""

    shards: Sequence[int] | None
    every: tuple[int, int] | None

    @property
    def all(self) -> bool:
        return self.shards is None and self.every is None

    def of(self, plan: dict[str, Any]) -> set[int]:
        """Their numbers."""
        rest, count = self.every or (0, 1)
        planned = state.shard_indices(plan) if self.shards is None else self.shards
        return {index for index in planned if index % count == rest}

    def missing(self, store: ShardStore, plan: dict[str, Any]) -> list[int]:
        """Those that are not complete, ascending."""
        chosen = self.of(plan)
        return [index for index in state.missing_shards(store, plan) if index in chosen]


def _progress(store: ShardStore, chosen: _Chosen) -> int:
    """Complete shards; while the manifest is planned, the clips that were looked at."""
    plan = store.read_plan()
    done = len(chosen.of(plan)) - len(chosen.missing(store, plan)) if plan else 0
    return done + store.num_probed()


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


def _result(
    store: ShardStore, plan: dict[str, Any], chosen: _Chosen, *, filled: list[int]
) -> dict[str, Any]:
    rows, wanted = state.ledger(store, plan), chosen.of(plan)
    counts = collections.Counter(row.state for row in rows if chosen.all or row.shard in wanted)
    return {"filled": filled, "missing": chosen.missing(store, plan), "clips": dict(counts)}


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
