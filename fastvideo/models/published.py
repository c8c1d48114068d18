# SPDX-License-Identifier: Apache-2.0
"""Configs of a recipe's transformers, from its folder or from what is known of it; no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvideo.config.architectures import Release, releases
from fastvideo.config.recipe import Recipe
from fastvideo.models.detect import check
from fastvideo.models.folder import read_config
from fastvideo.models.tiny_configs import TRANSFORMERS

Config = Mapping[str, Any]


def transformer_configs(recipe: Recipe) -> tuple[dict[str, Config], str]:
    """Return the config.json of each transformer that trains, and in words where they are from.

    ``model.path`` is a folder here, or the repository of a known release, or a tiny model that is
    still to be written. Else the largest release of the family and task stands in for it.

    Raises:
        UserError: The folder is not what the recipe says, or damaged.
    """
    path = Path(recipe.model.path).expanduser()
    if path.exists():
        check(path, recipe.model)
        found = {name: read_config(path, f"{name}/config.json") for name in recipe.transformers}
        return dict(found), "the folder model.path"
    config, source = _known(recipe)
    return dict.fromkeys(recipe.transformers, config), source


def _known(recipe: Recipe) -> tuple[Config, str]:
    model = recipe.model
    for release in releases():
        if release.repository == model.path:
            return release.transformer, f"{release.repository} as published"
    if Path(model.path).name.startswith("tiny_"):
        return TRANSFORMERS[model.family, model.task], "what `fastvideo tiny` will write"
    likely = max(
        (r for r in releases() if r.family == model.family and model.task in r.tasks), key=_size
    )
    return (
        likely.transformer,
        f"assumed to be those of {likely.repository}, for model.path is no folder here and no "
        "known release",
    )


def _size(release: Release) -> int:
    return release.parameters["transformer"]
