# SPDX-License-Identifier: Apache-2.0
"""LoRA files: what is written is read back, in every format."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_hunyuan_video_lora_to_diffusers,
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.config.architectures import releases
from fastvideo.models.lora_file import Adapter, read_lora, write_comfyui, write_lora
from fastvideo.models.lora_header import read_header
from fastvideo.models.lora_names import own_name
from fastvideo.models.lora_pair import Pair
from tests.lora_files import in_blocks, random_adapter, same
from tests.tiny_world import PAIRS, WAN21
from tests.tiny_world import Pair as Model

I2V = Model(task="i2v")
HUNYUAN = Model("hunyuan-video")


def product(pair: Pair) -> Tensor:
    """What the adapter adds to the projection's weight."""
    return pair.scale * pair.up.flatten(1).double() @ pair.down.flatten(1).double()


def close(one: Adapter, other: Adapter) -> bool:
    """The same changes of the same weights, to the rounding of float32, seen on a few inputs."""
    ours, theirs = one.pairs(), other.pairs()
    return ours.keys() == theirs.keys() and all(
        torch.allclose(outputs(ours[name]), outputs(theirs[name]), rtol=1e-6, atol=1e-5)
        for name in ours
    )


def outputs(pair: Pair) -> Tensor:
    down, up = pair.down.flatten(1).double(), pair.up.flatten(1).double()
    inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(0))
    return pair.scale * up @ (down @ inputs.double())


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("model", PAIRS, ids=str)
def test_a_written_lora_is_read_back(tmp_path: Path, model: Model, biases: bool) -> None:
    adapter = random_adapter(model, rank=3, alpha=7.5, biases=biases)
    write_lora(tmp_path / "lora.safetensors", adapter, about={"license": "apache-2.0"})
    found = read_lora(tmp_path / "lora.safetensors")
    assert (found.rank, found.alpha, found.alpha_pattern) == (3, 7.5, {})
    assert same(found.tensors, adapter.tensors)
    assert found.sizes() == adapter.sizes() == read_header(tmp_path / "lora.safetensors").sizes()
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata()["license"] == "apache-2.0"


def test_each_module_keeps_its_own_rank_and_alpha(tmp_path: Path) -> None:
    pairs = random_adapter(HUNYUAN).pairs()
    other = Pair(torch.randn(2, 128), torch.randn(64, 2), alpha=5.0)
    adapter = Adapter.of({**pairs, "proj_out": other})
    write_lora(tmp_path / "lora.safetensors", adapter)
    found = read_lora(tmp_path / "lora.safetensors").pairs()
    assert (found["proj_out"].rank, found["proj_out"].alpha) == (2, 5.0)
    block = found["single_transformer_blocks.0.proj_out"]
    assert (block.rank, block.alpha) == (4, 8.0), "whose name ends in proj_out as well"


@pytest.mark.parametrize("length", range(1, 80, 9))
def test_numbers_begin_at_multiples_of_64_bytes(tmp_path: Path, length: int) -> None:
    """However long the header is."""
    file = tmp_path / "lora.safetensors"
    write_lora(file, random_adapter(WAN21), about={"a": "b" * length})
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    places = [header[name]["data_offsets"][0] for name in header if name != "__metadata__"]
    assert begin % 64 == 0 and {place % 64 for place in places} == {0}
    assert load_file(file).keys() == {name for name in header if name != "__metadata__"}


def test_biases_of_some_become_zeros_of_the_others(tmp_path: Path) -> None:
    """PEFT gives one to all or none."""
    adapter = random_adapter(WAN21, biases=True)
    tensors = dict(adapter.tensors)
    gone = "blocks.1.ffn.net.2.lora_B.bias"
    del tensors[gone]
    write_lora(tmp_path / "lora.safetensors", Adapter(tensors, 4, 8.0))
    assert not read_lora(tmp_path / "lora.safetensors").tensors[gone].any()


# ---------------------------------------------------------------- ComfyUI


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("model", PAIRS, ids=str)
def test_comfyui_and_back_gives_the_same_tensors(
    tmp_path: Path, model: Model, biases: bool
) -> None:
    adapter = random_adapter(model, rank=4, alpha=8, biases=biases)
    file, again = tmp_path / "comfyui.safetensors", tmp_path / "again.safetensors"
    write_comfyui(file, adapter, family=model.family)
    assert all(name.startswith("diffusion_model.") for name in load_file(file))
    found = read_lora(file)
    assert (found.rank, found.alpha, found.alpha_pattern) == (4, 8, {})
    assert same(found.tensors, adapter.tensors)
    write_comfyui(again, found, family=model.family)
    assert again.read_bytes() == file.read_bytes()


def test_comfyuis_names_of_wan(tmp_path: Path) -> None:
    write_comfyui(tmp_path / "lora.safetensors", random_adapter(I2V, alpha=2), family="wan2.1")
    tensors = load_file(tmp_path / "lora.safetensors")
    start = "diffusion_model.blocks.1."
    assert tensors[start + "self_attn.q.lora_down.weight"].shape == (4, 128)
    assert tensors[start + "ffn.0.lora_up.weight"].shape == (256, 4)
    assert tensors[start + "cross_attn.k_img.alpha"] == 2
    assert "diffusion_model.head.head.lora_up.weight" in tensors


@pytest.mark.parametrize("model", PAIRS, ids=str)
def test_every_projection_has_a_name_of_its_own_in_comfyui(model: Model) -> None:
    for known in [r for r in releases() if r.family == model.family and model.task in r.tasks]:
        names = random_adapter(model).pairs()
        own = [own_name(name, known.family) for name in names]
        assert None not in own
        members = [part for named in {o for o in own if o} for part in named[1]]
        assert sorted(members) == sorted(names)


def test_a_fused_projection_computes_what_its_parts_compute(tmp_path: Path) -> None:
    """Block-diagonal B over stacked A; parts may lack, and differ in rank and scale."""
    pairs = random_adapter(HUNYUAN, only=in_blocks).pairs()
    block = "single_transformer_blocks.0."
    q, mlp = Pair(torch.randn(2, 128), torch.randn(128, 2), 3.0), pairs[f"{block}proj_mlp"]
    adapter = Adapter.of({f"{block}attn.to_q": q, f"{block}proj_mlp": mlp})
    write_comfyui(tmp_path / "lora.safetensors", adapter, family="hunyuan-video")
    tensors = load_file(tmp_path / "lora.safetensors")
    module = "diffusion_model.single_blocks.0.linear1"
    down, up = (tensors[f"{module}.lora_{name}.weight"] for name in "AB")
    change = (tensors[f"{module}.alpha"] / len(down)) * up @ down
    zeros = torch.zeros(256, 128)
    wanted = torch.cat([product(q), zeros, product(mlp)])
    torch.testing.assert_close(change.double(), wanted, rtol=1e-6, atol=1e-6)
    assert close(read_lora(tmp_path / "lora.safetensors"), adapter)


def test_a_foreign_fused_projection_shares_its_first_matrix(tmp_path: Path) -> None:
    fused = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.randn(4, 128),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": torch.randn(384, 4),
    }
    save_file(fused, tmp_path / "lora.safetensors")
    found = read_lora(tmp_path / "lora.safetensors")
    down, up = fused.values()
    for name, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        pair = found.pairs()[f"transformer_blocks.0.attn.{name}"]
        assert torch.equal(pair.down, down) and torch.equal(pair.up, rows) and pair.scale == 1
    write_comfyui(tmp_path / "again.safetensors", found, family="hunyuan-video")
    again = load_file(tmp_path / "again.safetensors")
    assert torch.equal(again["diffusion_model.double_blocks.0.img_attn_qkv.lora_B.weight"], up)


def test_scale_and_shift_change_places_in_hunyuans_last_layer(tmp_path: Path) -> None:
    adapter = random_adapter(HUNYUAN, only=lambda name: name == "norm_out.linear", alpha=4)
    write_comfyui(tmp_path / "lora.safetensors", adapter, family="hunyuan-video")
    name = "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"
    shift, scale = load_file(tmp_path / "lora.safetensors")[name].chunk(2)
    ours = adapter.tensors["norm_out.linear.lora_B.weight"]
    assert torch.equal(torch.cat([scale, shift]), ours)


# ---------------------------------------------------------------- diffusers' own converters


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("model", [m for m in PAIRS if m != HUNYUAN], ids=str)
def test_diffusers_reads_our_comfyui_files_of_wans_blocks(
    tmp_path: Path, model: Model, biases: bool
) -> None:
    """It knows no alpha outside of the blocks."""
    adapter = random_adapter(model, only=in_blocks, biases=biases)
    write_comfyui(tmp_path / "lora.safetensors", adapter, family=model.family)
    theirs = _convert_non_diffusers_wan_lora_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    assert close(plain(theirs), adapter)
    for name, pair in adapter.pairs().items():
        bias = theirs.get(f"transformer.{name}.lora_B.bias")
        assert (bias is None) == (not biases)
        assert bias is None or torch.allclose(bias, pair.scale * pair.bias)  # type: ignore


def test_diffusers_reads_our_comfyui_files_of_hunyuans_double_blocks(tmp_path: Path) -> None:
    """It knows no alpha, and no other width in the single blocks than the published one."""
    adapter = random_adapter(
        HUNYUAN, alpha=4, only=lambda n: in_blocks(n) and not n.startswith("single")
    )
    write_comfyui(tmp_path / "lora.safetensors", adapter, family="hunyuan-video")
    theirs = _convert_hunyuan_video_lora_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    assert close(plain(theirs), adapter)


def test_diffusers_reads_our_comfyui_files_of_hunyuans_single_blocks(tmp_path: Path) -> None:
    """At the published width."""
    block, wide = "single_transformer_blocks.7.", 3072
    outputs = {"attn.to_q": wide, "attn.to_k": wide, "attn.to_v": wide, "proj_mlp": 4 * wide}
    pairs = {
        block + name: Pair(torch.randn(2, wide), torch.randn(rows, 2), 2.0)
        for name, rows in outputs.items()
    }
    write_comfyui(tmp_path / "lora.safetensors", Adapter.of(pairs), family="hunyuan-video")
    tensors = load_file(tmp_path / "lora.safetensors")
    tensors |= {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.zeros(1, 1)}
    theirs = _convert_hunyuan_video_lora_to_diffusers(tensors)
    found = plain({name: tensor for name, tensor in theirs.items() if "single" in name})
    assert close(found, Adapter.of(pairs))


@pytest.mark.parametrize("model", PAIRS, ids=str)
def test_added_to_the_models_own_weights_our_comfyui_files_change_what_they_should(
    tmp_path: Path, model: Model
) -> None:
    """As ComfyUI adds them, by diffusers' own conversion of whole models: all names, all orders."""
    adapter = random_adapter(model, only=lambda name: not is_linear1(name))
    write_comfyui(tmp_path / "lora.safetensors", adapter, family=model.family)
    tensors = load_file(tmp_path / "lora.safetensors")
    down, up = ("lora_A", "lora_B") if model == HUNYUAN else ("lora_down", "lora_up")
    changes = {}
    for key in [key for key in tensors if key.endswith(f".{down}.weight")]:
        own = key.removesuffix(f".{down}.weight")
        a, b = tensors[key].flatten(1), tensors[f"{own}.{up}.weight"].flatten(1)
        changes[in_the_models_words(own) + ".weight"] = tensors[f"{own}.alpha"] / len(a) * b @ a
    convert = (
        convert_hunyuan_video_transformer_to_diffusers
        if model == HUNYUAN
        else convert_wan_transformer_to_diffusers
    )
    found = convert(changes)
    wanted = {f"{name}.weight": pair.change("weight") for name, pair in adapter.pairs().items()}
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-5)


def is_linear1(name: str) -> bool:
    """Which diffusers takes apart at the published width only; there is a test of it above."""
    return "single" in name and ("attn" in name or "proj_mlp" in name)


def in_the_models_words(key: str) -> str:
    """ComfyUI renames the embedders of HunyuanVideo."""
    name = key.removeprefix("diffusion_model.")
    for embedder, first, last in (
        ("time_in", "mlp.0", "mlp.2"),
        ("guidance_in", "mlp.0", "mlp.2"),
        ("txt_in.t_embedder", "mlp.0", "mlp.2"),
        ("txt_in.c_embedder", "linear_1", "linear_2"),
    ):
        name = name.replace(f"{embedder}.in_layer", f"{embedder}.{first}")
        name = name.replace(f"{embedder}.out_layer", f"{embedder}.{last}")
    return name


def plain(tensors: Mapping[str, Tensor]) -> Adapter:
    """Tensors of diffusers' converters, whose alpha is the rank."""
    start, end = "transformer.", ".lora_A.weight"
    names = [n.removeprefix(start).removesuffix(end) for n in tensors if n.endswith(end)]
    return Adapter.of(
        {
            name: Pair(down, tensors[f"{start}{name}.lora_B.weight"], float(len(down)))
            for name in names
            for down in [tensors[start + name + end]]
        }
    )


# ---------------------------------------------------------------- others' files


def test_musubis_names_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    adapter = random_adapter(I2V, only=in_blocks)
    write_comfyui(tmp_path / "comfyui.safetensors", adapter, family="wan2.1")
    tensors = {flat(key): t for key, t in load_file(tmp_path / "comfyui.safetensors").items()}
    save_file(tensors, tmp_path / "musubi.safetensors")
    assert "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight" in tensors
    assert same(read_lora(tmp_path / "musubi.safetensors").tensors, adapter.tensors)
    assert close(plain(_convert_musubi_wan_lora_to_diffusers(tensors)), adapter)


def test_musubis_names_of_hunyuan_are_read(tmp_path: Path) -> None:
    adapter = random_adapter(HUNYUAN)
    write_comfyui(tmp_path / "comfyui.safetensors", adapter, family="hunyuan-video")
    tensors = {flat(key): t for key, t in load_file(tmp_path / "comfyui.safetensors").items()}
    save_file(tensors, tmp_path / "musubi.safetensors")
    assert "lora_unet_single_blocks_0_linear1.lora_A.weight" in tensors
    assert close(read_lora(tmp_path / "musubi.safetensors"), adapter)


def flat(key: str) -> str:
    module, dot, end = re.fullmatch(r"(.+?)(\.)((?:lora|alpha|diff).*)", key).groups()  # type: ignore
    return "lora_unet_" + module.removeprefix("diffusion_model.").replace(".", "_") + dot + end


def test_pefts_own_files_are_read_with_the_config_beside_them(tmp_path: Path) -> None:
    adapter = random_adapter(WAN21)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 2, "alpha_pattern": {r"attn1\.to_q": 6}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read_lora(tmp_path / "adapter_model.safetensors")
    assert same(found.tensors, adapter.tensors)
    assert found.pairs()["blocks.0.attn1.to_k"].scale == 2 / 4**0.5
    assert found.pairs()["blocks.1.attn1.to_q"].scale == 6 / 4**0.5


def test_without_alpha_it_is_the_rank_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(dict(random_adapter(WAN21).tensors), tmp_path / "lora.safetensors")
    with caplog.at_level(logging.WARNING, logger="fastvideo"):
        found = read_lora(tmp_path / "lora.safetensors")
    assert found.alpha == 4
    assert "says no alpha" in caplog.text


def test_our_own_files_without_alpha_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """HunyuanVideo's, where alpha is the rank."""
    adapter = random_adapter(HUNYUAN, alpha=4)
    write_comfyui(tmp_path / "lora.safetensors", adapter, family="hunyuan-video")
    with caplog.at_level(logging.WARNING, logger="fastvideo"):
        assert same(read_lora(tmp_path / "lora.safetensors").tensors, adapter.tensors)
    assert not caplog.text


def test_names_of_adapters_within_keys_are_passed_over(tmp_path: Path) -> None:
    adapter = random_adapter(WAN21)
    tensors = {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in adapter.tensors.items()
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert same(read_lora(tmp_path / "lora.safetensors").tensors, adapter.tensors)
