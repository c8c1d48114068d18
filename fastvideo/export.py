# SPDX-License-Identifier: Apache-2.0
"""A checkpoint to a model folder that diffusers loads as it is."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastvideo import atomic, hashing, state
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.models.family import find_model
from fastvideo.state import RunDir, checkpoint_marker
from fastvideo.train.launcher import transformer_folder

WEIGHTS = (".safetensors", ".bin")


def export(recipe: Recipe) -> dict[str, Any]:
    """Write ``run_dir/export`` from the newest complete checkpoint.

    The trained transformer is written in float32, equal to the checkpoint bit for bit; the other
    parts are the base model's files. The folder appears complete or not at all.

    Returns:
        ``{"path": folder, "step": step, "ran": whether anything was to be done}``.

    Raises:
        UserError: There is no complete checkpoint.
    """
    run_dir = RunDir(recipe.run_dir)
    transformer = transformer_folder(recipe)
    directory = run_dir.training(transformer)
    steps = directory.complete_checkpoints()
    if not steps:
        raise UserError(f"{directory.checkpoints}: holds no complete checkpoint; run train first")
    checkpoint = directory.checkpoint(steps[-1])
    made_from = {
        "schema": state.SCHEMA_VERSION,
        "step": steps[-1],
        "transformer": transformer,
        "checkpoint": hashing.file_sha256(checkpoint_marker(checkpoint)),
        "base": hashing.folder_stamp(find_model(recipe.model.path), without=(transformer,)),
        "settings": recipe.export.model_dump(mode="json"),
    }
    result = {"path": str(run_dir.export), "step": steps[-1]}
    if atomic.read_json(run_dir.export_marker) == made_from:
        logger.info("already exported: %s", run_dir.export)
        return {**result, "ran": False}
    _write(recipe, run_dir.export, checkpoint=checkpoint, transformer=transformer)
    atomic.write_json(run_dir.export_marker, made_from, point="export.marker")
    logger.info("exported step %d to %s", steps[-1], run_dir.export)
    return {**result, "ran": True}


def _write(recipe: Recipe, folder: Path, *, checkpoint: Path, transformer: str) -> None:
    from fastvideo.checkpoint import load_weights
    from fastvideo.models.family import find_family

    base = find_model(recipe.model.path)
    temporary = atomic.temporary_name(folder)
    atomic.sweep(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    _copy(base, temporary, without=transformer, link=recipe.export.components == "link")
    model: Any = find_family(recipe.model.family).load_transformer(base, folder=transformer)
    load_weights(checkpoint, model)
    model.save_pretrained(
        temporary / transformer, max_shard_size=int(recipe.export.max_shard_gib * 2**30)
    )
    _keep_config(base / transformer, temporary / transformer)
    for path in temporary.rglob("*"):
        atomic.sync(path)
    # A complete export stays until the new one is: its marker goes first, then the folders swap.
    (folder / "fastvideo.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    atomic.sync(folder.parent)


def _keep_config(base: Path, exported: Path) -> None:
    """Keep the base model's own config.json, without the local path diffusers adds."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    atomic.write_json(exported / "config.json", config, point="export.config")


def _copy(base: Path, target: Path, *, without: str, link: bool) -> None:
    for source in sorted(base.rglob("*")):
        relative = source.relative_to(base)
        if not source.is_file() or relative.parts[0] == without or _hidden(relative):
            continue
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Only weights: nobody edits them in place, while a linked config would be the base's own.
        _bring(source.resolve(), destination, link=link and source.suffix in WEIGHTS)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _bring(source: Path, destination: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source, destination)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copy2(source, destination)
