# SPDX-License-Identifier: Apache-2.0
"""The node's parent: checks a run before torch is loaded, then trains in this process.

Free of torch until there is something to train, so that a finished run answers at once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo import state
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.state import RunDir, ShardStore
from fastvideo.train.stop import StopRequest

MAY_CHANGE = (
    "run_dir",
    "source",
    "shards.path",
    "shards.rows",
    "model.path",
    "preprocess",
    "validation",
    "export",
    "generate",
    "train.steps",
    "train.micro_batch_size",
    "train.device",
    "train.activation_checkpointing",
    "train.checkpoint",
    "train.heldout",
    "train.log_every_steps",
    "train.loader_workers",
)
"""What a resumed run may say differently: lengths, cadences, layout, places, other verbs. The data
and the base model are compared by content, not by their keys."""


def train(recipe: Recipe, *, force: bool = False) -> dict[str, Any]:
    """Train until ``train.steps``, from the newest complete checkpoint.

    Args:
        recipe: What to train.
        force: Go on even if keys or data that decide the result changed since the run began.

    Returns:
        ``{"transformer": name, "step": last, "ran": whether anything was left to do}``.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        UserError: The run cannot start or go on as asked, with the reason.
    """
    transformer = transformer_folder(recipe)
    run_dir = RunDir(recipe.run_dir)
    directory = run_dir.training(transformer)
    steps = directory.complete_checkpoints()
    if not force:
        _check_recipe(recipe, run_dir, started=bool(steps))
    # A run may have been killed between a save and this.
    state.prune_checkpoints(directory, keep_last=recipe.train.checkpoint.keep_last)
    result = {"transformer": transformer, "step": recipe.train.steps}
    if steps and steps[-1] >= recipe.train.steps:
        logger.info("already trained: %s", directory.checkpoint(steps[-1]))
        return {**result, "step": steps[-1], "ran": False}
    stop = StopRequest(run_dir)

    from fastvideo.data.loader import complete_plan
    from fastvideo.train import worker

    plan = complete_plan(ShardStore(recipe.shards.path))
    _check_settings(recipe, plan["settings"])
    if steps and not force:
        _check_data(directory.checkpoint(steps[-1]), plan)
    state.write_bytes(run_dir.recipe, recipe.dump().encode(), point="recipe")
    worker.train(recipe, transformer=transformer, plan=plan, stop=stop)
    return {**result, "ran": True}


def transformer_folder(recipe: Recipe) -> str:
    """Folder of the transformer that the recipe trains."""
    expert = recipe.train.expert
    return recipe.architecture.experts[expert] if expert else "transformer"


def _check_recipe(recipe: Recipe, run_dir: RunDir, *, started: bool) -> None:
    if not started or not run_dir.recipe.is_file():
        return
    before = dict(_flat(Recipe.load(run_dir.recipe).model_dump(mode="json")))
    after = dict(_flat(recipe.model_dump(mode="json")))
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{run_dir.recipe}: this run was started with other values: {'; '.join(changed)}. Put "
            "them back, choose another run_dir, or go on all the same with --force"
        )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _check_settings(recipe: Recipe, settings: dict[str, Any]) -> None:
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
                f"{recipe.shards.path}: was encoded with {key} {settings[key]!r}, the recipe says "
                f"{value!r}; run preprocess, or use the recipe the shards were made with"
            )


def _check_data(newest: Path, plan: dict[str, Any]) -> None:
    marker = state.read_checkpoint_marker(newest)
    assert marker is not None
    if marker["data"] != state.fingerprint(plan["shards"]):
        raise UserError(
            f"{newest}: was trained on other clips than the shards hold now; choose another "
            "run_dir, or go on with the new clips with --force"
        )
