# SPDX-License-Identifier: Apache-2.0
"""Which projections get an adapter."""

import re
from pathlib import Path

import pytest

from fastvideo.config.lora import targets
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.errors import UserError

NAMES = [
    "patch_embedding",
    "condition_embedder.time_proj",
    "blocks.0.attn1.to_q",
    "blocks.0.attn2.to_out.0",
    "blocks.0.ffn.net.0.proj",
    "blocks.10.ffn.net.2",
    "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_q_proj",
    "transformer_blocks.0.norm1.linear",
    "single_transformer_blocks.3.proj_mlp",
    "proj_out",
]


def chosen(*patterns: str) -> list[str]:
    return targets(Lora(targets=patterns), NAMES)


def test_the_presets_take_projections_of_blocks_and_no_others() -> None:
    attention = targets(Lora(targets="attention"), NAMES)
    assert attention == [NAMES[2], NAMES[3], NAMES[7]]
    assert targets(Lora(), NAMES) == [NAMES[i] for i in (2, 3, 4, 5, 7, 9)]


def test_patterns_match_whole_names_and_the_order_is_the_models() -> None:
    assert chosen("proj_out", r"blocks\.\d+\.ffn.*") == [NAMES[4], NAMES[5], NAMES[10]]
    assert chosen(r"blocks\.0\.attn1\.to_q", r".*to_q") == [NAMES[2], NAMES[6]]


@pytest.mark.parametrize("patterns", [("to_q",), ("proj_out", "nothing")])
def test_a_pattern_that_matches_nothing_is_refused(patterns: tuple[str, ...]) -> None:
    message = f"{patterns[-1]!r} matches no projection .* like blocks.0.attn1.to_q"
    with pytest.raises(UserError, match=rf"train\.method\.targets: {message}"):
        chosen(*patterns)


def test_a_preset_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("'attention' matches no projection")):
        targets(Lora(targets="attention"), ["patch_embedding", "proj_out"])


def test_a_recipe_lists_patterns(tmp_path: Path) -> None:
    recipe = Recipe.load(
        Path(__file__).parents[3] / "configs/recipes/tiny_wan2.1_t2v_lora.yaml",
        [r"train.method.targets=['blocks\.\d+\.ffn.*', proj_out]"],
    )
    assert isinstance(recipe.train.method, Lora)
    assert recipe.train.method.targets == (r"blocks\.\d+\.ffn.*", "proj_out")
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe.dump())
    assert Recipe.load(written) == recipe
