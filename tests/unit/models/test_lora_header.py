# SPDX-License-Identifier: Apache-2.0
"""What is no LoRA, damaged, or of another model is refused by file and key."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastvideo.config.architectures import release
from fastvideo.errors import UserError
from fastvideo.models.lora_file import Adapter, read_lora, write_lora
from fastvideo.models.lora_header import check_fits, read_header
from fastvideo.models.lora_pair import Pair
from fastvideo.models.tiny_configs import TRANSFORMERS
from tests.lora_files import in_blocks, random_adapter
from tests.tiny_world import PAIRS, WAN21

MISTAKES: dict[str, tuple[dict[str, Tensor], str]] = {
    "no lora": ({"blocks.0.norm2.weight": torch.ones(2)}, "blocks.0.norm2.weight is no part"),
    "whole weights": ({"diffusion_model.blocks.0.norm3.diff": torch.ones(2)}, "is no part of a"),
    "dora": ({"a.dora_scale": torch.ones(2)}, "DoRA, LoKr"),
    "half": ({"a.lora_A.weight": torch.ones(2, 3)}, "a has no lora_B or lora_up"),
    "half with a bias": (
        {"a.lora_A.weight": torch.ones(2, 3), "a.diff_b": torch.ones(5)},
        "a has no lora_B or lora_up; it is incomplete",
    ),
    "a bias alone": (
        {"a.diff_b": torch.ones(5)},
        "a.diff_b changes a bias of which the weight has no matrices, which is not supported",
    ),
    "ranks": (
        {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(5, 4)},
        r"have shapes \(2, 3\) and \(5, 4\)",
    ),
    "alpha": (
        {
            "a.lora_A.weight": torch.ones(2, 3),
            "a.lora_B.weight": torch.ones(5, 2),
            "a.alpha": torch.zeros(()),
        },
        "alpha of a is 0, not a positive number",
    ),
    "twice": (
        {
            f"{module}.{name}.weight": torch.ones(128, 128)
            for module in (
                "transformer.blocks.0.attn1.to_q",
                "diffusion_model.blocks.0.self_attn.q",
            )
            for name in ("lora_A", "lora_B")
        },
        "blocks.0.attn1.to_q is there twice",
    ),
    "no parts": (
        {
            "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.ones(2, 8),
            "diffusion_model.double_blocks.0.img_attn_qkv.lora_B.weight": torch.ones(25, 2),
        },
        "has 25 outputs, which do not divide into to_q, to_k, to_v",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_lora_is_refused_by_file_and_key(tmp_path: Path, mistake: str) -> None:
    tensors, message = MISTAKES[mistake]
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: .*{message}"):
        read_lora(file)


def test_a_file_that_is_none_or_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match="No such file"):
        read_lora(file)
    with pytest.raises(UserError, match="is no safetensors file"):
        read_lora(tmp_path)
    file.write_bytes(b"PK\x03\x04 a pickle")
    with pytest.raises(UserError, match="is no safetensors file"):
        read_lora(file)
    write_lora(file, random_adapter(WAN21))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is damaged"):
        read_lora(file)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a.lora_A.weight": {"shape": ["2", 3]}, "a.lora_B.weight": {"shape": [3, 2]}},
        {"a.lora_A.weight": {"shape": None}},
        {"a.lora_A.weight": 3},
        {"__metadata__": {"lora_adapter_metadata": 3}},
        {"__metadata__": []},
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="its header is damaged"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "its lora_adapter_metadata is damaged"),
        ("[]", "its lora_adapter_metadata is damaged"),
        ('{"transformer.use_dora": true}', "was trained with use_dora"),
        ('{"transformer.alpha_pattern": {"(": 1}}', "'\\(' is no expression"),
        ('{"transformer.lora_alpha": 0}', "is 0, not a positive number"),
        ('{"transformer.lora_alpha": "x"}', "alpha of .* is 'x', not a positive number"),
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(
    tmp_path: Path, config: str, message: str
) -> None:
    tensors, metadata = dict(random_adapter(WAN21).tensors), {"lora_adapter_metadata": config}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "x.safetensors")


def test_a_lora_fits_its_own_model_and_no_other(tmp_path: Path) -> None:
    for model in PAIRS:
        sizes, config = random_adapter(model).sizes(), TRANSFORMERS[model.family, model.task]
        check_fits(sizes, config, model.family, name="x")
    text = random_adapter(WAN21, only=in_blocks).sizes()
    check_fits(text, TRANSFORMERS["wan2.1", "i2v"], "wan2.1", name="a subset fits")
    with pytest.raises(UserError, match="x: does not fit the model: there is no projection blocks"):
        check_fits(text, TRANSFORMERS["hunyuan-video", "t2v"], "hunyuan-video", name="x")


def test_a_lora_of_another_size_is_refused_with_the_model_it_fits() -> None:
    """Of one projection, with the shapes of 14B."""
    adapter = Adapter.of(
        {"blocks.0.attn1.to_q": Pair(torch.ones(2, 5120), torch.ones(5120, 2), 2.0)}
    )
    small = release("wan2.1_t2v_1.3b")
    with pytest.raises(UserError, match=r"takes 1536 numbers to 1536, the LoRA's 5120 to 5120"):
        check_fits(adapter.sizes(), small.transformer, small.family, name="x")
    with pytest.raises(UserError, match=r"it has the shapes of .*wan2.1_t2v_14b"):
        check_fits(adapter.sizes(), small.transformer, small.family, name="x")
