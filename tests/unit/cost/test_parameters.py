# SPDX-License-Identifier: Apache-2.0
"""Parameter counts against the released checkpoints and the classes of diffusers."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

from fastvideo.config.architectures import release, releases
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers, parameters
from fastvideo.models.tiny_configs import TRANSFORMERS

ONE = Tokens(video=1, text=1)
CONFIGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{f"tiny {family} {task}": (family, c) for (family, task), c in TRANSFORMERS.items()},
    "wan2.1_i2v_14b_480p": ("wan2.1", release("wan2.1_i2v_14b_480p").transformer),
    "hunyuan_t2v": ("hunyuan-video", release("hunyuan_t2v").transformer),
    "image positions, no norm before text": (
        "wan2.1",
        {
            **TRANSFORMERS["wan2.1", "i2v"],
            "pos_embed_seq_len": 514,
            "cross_attn_norm": False,
        },
    ),
    "no guidance": (
        "hunyuan-video",
        {**TRANSFORMERS["hunyuan-video", "t2v"], "guidance_embeds": False, "mlp_ratio": 3.0},
    ),
}


@pytest.mark.parametrize("name", [facts.name for facts in releases()])
def test_released_checkpoints_have_as_many(name: str) -> None:
    facts = release(name)
    assert parameters(facts.transformer, facts.family) == facts.parameters["transformer"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_diffusers_has_its_name_and_size(name: str) -> None:
    family, config = CONFIGS[name]
    kind = HunyuanVideoTransformer3DModel if "hunyuan" in family else WanTransformer3DModel
    options = {key: value for key, value in config.items() if key != "_class_name"}
    with torch.device("meta"):
        model = kind(**options)
    expected = {key: value.numel() for key, value in model.named_parameters()}
    assert layers(config, family, ONE).sizes() == expected


def test_blocks_are_counted_by_their_names() -> None:
    found = layers(release("wan2.1_t2v_14b").transformer, "wan2.1", ONE)
    assert len(set(found.block_sizes())) == 1 and len(found.block_sizes()) == 40
    outside = sum(n for name, n in found.sizes().items() if not name.startswith("blocks."))
    assert sum(found.block_sizes()) + outside == sum(found.sizes().values())
