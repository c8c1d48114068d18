# SPDX-License-Identifier: Apache-2.0
"""Which projections of the released checkpoints get an adapter; diffusers' classes on meta."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from fastvideo.config.architectures import release, releases
from fastvideo.config.lora import targets
from fastvideo.config.train import Lora
from fastvideo.cost.adapters import projections
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers, parameters
from fastvideo.models.adapters import add_adapters

ONE = Tokens(video=1, text=1)
NAMES = [facts.name for facts in releases()]
every_release = pytest.mark.parametrize("name", NAMES)


def empty(config: Mapping[str, Any]) -> nn.Module:
    options = {key: value for key, value in config.items() if key != "_class_name"}
    kind = WanTransformer3DModel
    if "Hunyuan" in config["_class_name"]:
        kind = HunyuanVideoTransformer3DModel
    with torch.device("meta"):
        model: nn.Module = kind(**options)
    return model


@cache
def linears(name: str) -> list[str]:
    modules = empty(release(name).transformer).named_modules()
    return [key for key, module in modules if isinstance(module, nn.Linear)]


@every_release
def test_names_without_torch_are_those_of_the_modules(name: str) -> None:
    facts = release(name)
    found = projections(layers(facts.transformer, facts.family, ONE))
    assert len(set(found)) == len(found)
    assert set(found) == set(linears(name))


# Of Wan eight projections of attention a block, two more where it attends to an image, and two of
# the feed-forward layer; of HunyuanVideo eight and four in 20 double blocks, three and two in 40
# single ones.
EXPECTED = {
    "wan2.1_t2v_1.3b": (30 * 8, 30 * 10),
    "wan2.1_t2v_14b": (40 * 8, 40 * 10),
    "wan2.1_i2v_14b_480p": (40 * 10, 40 * 12),
    "wan2.1_i2v_14b_720p": (40 * 10, 40 * 12),
    "wan2.2_t2v_a14b": (40 * 8, 40 * 10),
    "wan2.2_i2v_a14b": (40 * 8, 40 * 10),
    "wan2.2_ti2v_5b": (30 * 8, 30 * 10),
    "hunyuan_t2v": (20 * 8 + 40 * 3, 20 * 12 + 40 * 5),
}


@every_release
def test_presets_choose_the_blocks_projections(name: str) -> None:
    attention, blocks = (
        targets(Lora(targets=preset), linears(name)) for preset in ("attention", "blocks")
    )
    assert (len(attention), len(blocks)) == EXPECTED[name]
    assert set(attention) < set(blocks)
    ends = ("embed", "refiner", "time", "norm", "modulation")
    assert not [key for key in blocks if any(part in key for part in ends)]
    assert "proj_out" not in blocks


@every_release
def test_what_trains_is_as_large_as_the_adapters_of_peft(name: str) -> None:
    """At the real width; the blocks of a kind are alike, here there are two."""
    method, facts = Lora(rank=16, biases=True, norms=True), release(name)
    depth = {key: 2 for key in facts.transformer if key in ("num_layers", "num_single_layers")}
    config = {**facts.transformer, **depth}
    found = layers(config, facts.family, ONE, method=method)
    model = empty(config)
    add_adapters(model, method)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sorted(found.trained.sizes().values()) == sorted(sizes)
    frozen = sum(p.numel() for p in model.parameters()) - sum(sizes)
    norms = sum(found.trained.tables.values())
    assert frozen + norms == parameters(config, facts.family)
