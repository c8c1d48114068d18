# SPDX-License-Identifier: Apache-2.0
"""Which transformers of a run are trained, and whether they fit the recipe's model; no torch."""

from pathlib import Path
from typing import Any

from fastvideo import hashing, state
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.errors import UserError
from fastvideo.models.family import find_family
from fastvideo.models.folder import read_config, weights_sample, without_traces
from fastvideo.state import RunDir

NAMES = {
    "family": "model.family is another",
    "task": "model.task is another",
    "transformer": "the base model has another architecture",
    "interval": "the base model's boundary_ratio is another",
    "method": "train.method.kind is another",
    "base": "the weights of the base model, which adapters belong to, are others",
}
"""What a checkpoint remembers of the model it was trained from, and how to say that it differs."""


OLD = {"method": "full"}
"""Facts that checkpoints did not hold when there was nothing else."""


def model_facts(recipe: Recipe, base: Path, *, transformer: str) -> dict[str, Any]:
    """What training, export and sampling must agree on; plain values."""
    interval = find_family(recipe).interval(base, folder=transformer)
    is_lora = isinstance(recipe.train.method, Lora)
    return {
        "family": recipe.model.family,
        "task": recipe.model.task,
        "transformer": hashing.fingerprint(
            without_traces(read_config(base, f"{transformer}/config.json"))
        ),
        "interval": [interval.low, interval.high],
        "method": recipe.train.method.kind,
        **({"base": weights_sample(base, transformer)} if is_lora else {}),
    }


def newest(recipe: Recipe, base: Path) -> dict[str, Path]:
    """The newest complete checkpoint of each transformer that was trained in the run.

    Raises:
        UserError: None was, or one was trained from another model than the recipe's ``base``.
    """
    find_family(recipe).check(base)
    found = state.newest_checkpoints(RunDir(recipe.run_dir), recipe.architecture.transformers)
    for transformer, path in found.items():
        _check_facts(recipe, base, path, transformer=transformer)
    return found


def newest_of(recipe: Recipe, base: Path, *, transformer: str) -> Path | None:
    """The newest complete checkpoint of one transformer; None if there is none.

    Raises:
        UserError: It was trained from another model than the recipe's ``base``.
    """
    path = RunDir(recipe.run_dir).training(transformer).newest_checkpoint()
    if path is not None:
        _check_facts(recipe, base, path, transformer=transformer)
    return path


def _check_facts(recipe: Recipe, base: Path, path: Path, *, transformer: str) -> None:
    marker = state.read_checkpoint_marker(path)
    assert marker is not None
    for key, value in model_facts(recipe, base, transformer=transformer).items():
        if marker["about"].get(key, OLD.get(key)) != value:
            raise UserError(
                f"{path}: was trained when this was different: {NAMES[key]}; use the recipe "
                "and the model.path it was trained with"
            )
