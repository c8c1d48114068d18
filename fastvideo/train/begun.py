# SPDX-License-Identifier: Apache-2.0
"""What a run that began may say differently when it goes on; no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo import state
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.state import RunDir, TrainDir
from fastvideo.trained import NAMES, OLD

MAY_CHANGE = (
    "run_dir",
    "source",
    "shards.path",
    "shards.rows",
    "model.path",
    "preprocess",
    "train.expert",
    "validation",
    "export",
    "generate",
    "parallel.processes",
    "parallel.replicate",
    "parallel.shard",
    "parallel.sequence",
    "parallel.cpu_offload",
    "train.steps",
    "train.micro_batch_size",
    "train.device",
    "train.activation_checkpointing",
    "train.compile",
    "train.checkpoint",
    "train.heldout",
    "train.samples",
    "train.watch",
    "train.log_every_steps",
    "train.tensorboard",
    "train.wandb",
    "train.profile",
    "train.loader_workers",
)
"""What a resumed run may say differently: lengths, cadences, layout, places, other verbs. What
`source` and `model.path` stand for is compared by content: clips, architecture, shift, and the
frozen weights that adapters belong to."""


def check_begun(recipe: Recipe, directory: TrainDir, about: dict[str, Any]) -> None:
    """Refuse to go on from the newest checkpoint where recipe or data decide another result.

    Raises:
        UserError: Every key that changed, or what did of the data and the model.
    """
    if begun := directory.newest_checkpoint():
        _check_recipe(recipe, directory)
        _check_same(begun, about)


def check_family(recipe: Recipe) -> None:
    """Transformers of one run are exported together: they must be of one model."""
    for folder in sorted(RunDir(recipe.run_dir).root.glob("train/*/")):
        newest = TrainDir(folder).newest_checkpoint()
        marker = state.read_checkpoint_marker(newest) if newest else None
        family = marker["about"].get("family") if marker else None
        if family not in (None, recipe.model.family):
            raise UserError(
                f"{folder}: was trained from a {family} model, the recipe says "
                f"{recipe.model.family}; choose another run_dir"
            )


def _check_recipe(recipe: Recipe, directory: TrainDir) -> None:
    if not directory.recipe.is_file():
        return
    before = dict(_flat(Recipe.load(directory.recipe).model_dump(mode="json")))
    after = dict(_flat(recipe.model_dump(mode="json")))
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{directory.recipe}: this run was started with other values: {'; '.join(changed)}. "
            "Put them back, choose another run_dir, or go on all the same with --force"
        )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _check_same(begun: Path, about: dict[str, Any]) -> None:
    """The newest checkpoint must come from the same clips, architecture and shift."""
    marker = state.read_checkpoint_marker(begun)
    assert marker is not None
    names = {
        **NAMES,
        "clips": "the shards hold other clips, or other ones are held out",
        "shift": "the base model's flow_shift is another",
        "settings": "train.method has other settings",
    }
    for key, value in about.items():
        if marker["about"].get(key, OLD.get(key, value if key == "settings" else None)) != value:
            raise UserError(
                f"{begun}: was trained when this was different: {names[key]}. Choose another "
                "run_dir for a new run, or go on from here with --force (and more train.steps)"
            )
