# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to a folder that diffusers loads as it is: a model, or the LoRA of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo import atomic, hashing, model_card, state, trained
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.errors import UserError
from fastvideo.export_folder import copy_config, copy_parts, name_tokenizers, replacing_folder
from fastvideo.log import logger
from fastvideo.models.family import find_family
from fastvideo.models.folder import find_model
from fastvideo.state import RunDir, checkpoint_marker


def export(recipe: Recipe) -> dict[str, Any]:
    """Write ``run_dir/export`` from the newest complete checkpoints.

    Every trained transformer is written, equal to its checkpoint bit for bit in float32; the other
    parts are the base model's files. Of adapters there are LoRA files and no model. The folder
    appears complete or not at all.

    Returns:
        ``{"path": folder, "steps": {transformer: step}, "ran": whether anything was to be done}``.

    Raises:
        UserError: There is no complete checkpoint, or none with the average that is asked for.
    """
    run_dir = RunDir(recipe.run_dir)
    base = find_model(recipe.model.path)
    checkpoints = trained.newest(recipe, base)
    for folder in recipe.architecture.transformers:
        if folder not in checkpoints:
            logger.warning("%s was not trained in this run and stays the base model's", folder)
    made_from = {
        "schema": state.SCHEMA_VERSION,
        "method": recipe.train.method.kind,
        "checkpoints": {
            folder: hashing.file_sha256(checkpoint_marker(checkpoint))
            for folder, checkpoint in checkpoints.items()
        },
        "base": hashing.folder_stamp(base, without=tuple(checkpoints)),
        "settings": _settings(recipe),
    }
    trainings = {name: _training(recipe, name, path) for name, path in checkpoints.items()}
    _check_averages(recipe, trainings)
    steps = {name: training.marker["step"] for name, training in trainings.items()}
    result = {"path": str(run_dir.export), "steps": steps}
    busy = f"{run_dir.export}: another process exports there; wait for it"
    with atomic.alone(run_dir.root / "export.lock", busy=busy):
        if atomic.read_json(run_dir.export_marker) == made_from:
            logger.info("already exported: %s", run_dir.export)
            return {**result, "ran": False}
        pipeline = find_family(recipe).pipeline
        card = model_card.text(recipe, base=base, pipeline=pipeline, trained=trainings)
        _write(recipe, base=base, checkpoints=checkpoints, card=card, made_from=made_from)
    logger.info("exported %s to %s", _describe(steps), run_dir.export)
    return {**result, "ran": True}


def _check_averages(recipe: Recipe, trainings: Mapping[str, model_card.Training]) -> None:
    for name, training in trainings.items():
        if recipe.export.ema and not training.marker.get("average"):
            raise UserError(
                f"export.ema=True: {name} was trained without train.ema; leave it out to export "
                "the last weights"
            )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe decides the files."""
    settings = {**recipe.export.model_dump(mode="json"), "ema": recipe.averaged}
    if isinstance(recipe.train.method, Lora):
        del settings["max_shard_gib"], settings["components"]
    return settings


def _training(recipe: Recipe, transformer: str, checkpoint: Path) -> model_card.Training:
    marker = state.read_checkpoint_marker(checkpoint)
    assert marker is not None
    written = RunDir(recipe.run_dir).training(transformer).recipe
    return model_card.Training(marker, written.read_text(encoding="utf-8"))


def _describe(steps: Mapping[str, int]) -> str:
    return " and ".join(f"step {step} of {folder}" for folder, step in steps.items())


def _write(
    recipe: Recipe,
    *,
    base: Path,
    checkpoints: Mapping[str, Path],
    card: str,
    made_from: Mapping[str, Any],
) -> None:
    run_dir = RunDir(recipe.run_dir)
    folder, vouches = run_dir.export, run_dir.export_marker
    with replacing_folder(folder, point="export", marker=vouches) as temporary:
        if isinstance(recipe.train.method, Lora):
            _write_adapters(recipe, temporary, base=base, checkpoints=checkpoints)
        else:
            _write_model(recipe, temporary, base=base, checkpoints=checkpoints)
        (temporary / model_card.NAME).write_text(card, encoding="utf-8")
        # In the folder before it appears, so that it never vouches for another export.
        marker = temporary / run_dir.export_marker.name
        atomic.write_json(marker, made_from, point="export.marker")


def _write_adapters(
    recipe: Recipe, target: Path, *, base: Path, checkpoints: Mapping[str, Path]
) -> None:
    from fastvideo.export_adapters import write_adapters

    for name, checkpoint in checkpoints.items():
        write_adapters(target, recipe, base=base, transformer=name, checkpoint=checkpoint)


def _write_model(
    recipe: Recipe, target: Path, *, base: Path, checkpoints: Mapping[str, Path]
) -> None:
    # The base may be an export itself, with a card and a marker of its own.
    without = (*checkpoints, model_card.NAME, RunDir(recipe.run_dir).export_marker.name)
    copy_parts(base, target, without=without, link=recipe.export.components == "link")
    for name, checkpoint in checkpoints.items():
        _write_transformer(recipe, target / name, base=base, checkpoint=checkpoint)
    name_tokenizers(target)


def _write_transformer(recipe: Recipe, target: Path, *, base: Path, checkpoint: Path) -> None:
    from fastvideo.checkpoint import part_of, verify
    from fastvideo.export_weights import write_weights

    verify(checkpoint)
    # Cast as loading does: some parts of a model stay float32.
    model: Any = find_family(recipe).empty_transformer(
        base, folder=target.name, dtype=recipe.export.dtype
    )
    write_weights(
        target,
        like=model.state_dict(),
        checkpoint=checkpoint,
        part=part_of(checkpoint, average=recipe.averaged),
        max_bytes=int(recipe.export.max_shard_gib * 2**30),
    )
    copy_config(base / target.name, target)
