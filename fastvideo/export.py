# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to a folder that diffusers loads as it is: a model, or the LoRA of one."""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastvideo import atomic, hashing, model_card, state, trained
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.models.family import find_family
from fastvideo.models.folder import find_model
from fastvideo.state import RunDir, checkpoint_marker

WEIGHTS = (".safetensors", ".bin")


def export(recipe: Recipe) -> dict[str, Any]:
    """Write ``run_dir/export`` from the newest complete checkpoints.

    Every trained transformer is written, equal to its checkpoint bit for bit in float32; the other
    parts are the base model's files. Of adapters there are LoRA files and no model. The folder
    appears complete or not at all.

    Returns:
        ``{"path": folder, "steps": {transformer: step}, "ran": whether anything was to be done}``.

    Raises:
        UserError: There is no complete checkpoint, or no average in one.
    """
    _check(recipe)
    run_dir = RunDir(recipe.run_dir)
    base = find_model(recipe.model.path)
    checkpoints = trained.newest(recipe, base)
    for folder in recipe.architecture.transformers:
        if folder not in checkpoints:
            logger.warning("%s was not trained in this run and stays the base model's", folder)
    made_from = {
        "schema": state.SCHEMA_VERSION,
        "checkpoints": {
            folder: hashing.file_sha256(checkpoint_marker(checkpoint))
            for folder, checkpoint in checkpoints.items()
        },
        "base": hashing.folder_stamp(base, without=tuple(checkpoints)),
        "settings": recipe.export.model_dump(mode="json"),
    }
    trainings = {name: _training(recipe, name, path) for name, path in checkpoints.items()}
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


def _check(recipe: Recipe) -> None:
    if recipe.export.ema and recipe.train.ema is None:
        raise UserError(
            "export.ema: training keeps no average; set train.ema before training, or leave it out"
        )


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
    folder, marker = RunDir(recipe.run_dir).export, RunDir(recipe.run_dir).export_marker
    temporary = atomic.temporary_name(folder)
    atomic.sweep(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if isinstance(recipe.train.method, Lora):
        _write_adapters(recipe, temporary, base=base, checkpoints=checkpoints)
    else:
        _write_model(recipe, temporary, base=base, checkpoints=checkpoints)
    (temporary / model_card.NAME).write_text(card, encoding="utf-8")
    # In the folder before it appears, so that it never vouches for another export.
    atomic.write_json(temporary / marker.name, made_from, point="export.marker")
    for path in temporary.rglob("*"):
        atomic.sync(path)
    # A complete export stays until the new one is: its marker goes first, then the folders swap.
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    atomic.sync(folder.parent)


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
    _copy(base, target, without=without, link=recipe.export.components == "link")
    for name, checkpoint in checkpoints.items():
        _write_transformer(recipe, target / name, base=base, checkpoint=checkpoint)
    name_tokenizers(target)


def _write_transformer(recipe: Recipe, target: Path, *, base: Path, checkpoint: Path) -> None:
    from fastvideo.checkpoint import verify
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
        part="average" if recipe.export.ema else "model",
        max_bytes=int(recipe.export.max_shard_gib * 2**30),
    )
    _copy_config(base / target.name, target)


def name_tokenizers(folder: Path) -> None:
    """Name the class that takes ``tokenizer.json`` as it is, in transformers 4 and 5.

    The base model's names may have it rebuilt by other rules, see ``load_tokenizer``.
    """
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name / "tokenizer.json").is_file():
            index[name] = ["transformers", "PreTrainedTokenizerFast"]
    atomic.write_json(index_file, index, point="export.index")


def _copy_config(base: Path, exported: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    atomic.write_json(exported / "config.json", config, point="export.config")


def _copy(base: Path, target: Path, *, without: Collection[str], link: bool) -> None:
    for source in hashing.files_below(base):
        relative = source.relative_to(base)
        if relative.parts[0] in without or _hidden(relative):
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
