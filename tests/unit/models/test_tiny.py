# SPDX-License-Identifier: Apache-2.0
"""The tiny models are whole, load as the published ones do, and tell their inputs apart."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    HunyuanVideoPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel

from fastvideo.models.tiny import BUILDERS, write_tiny

Pair = tuple[str, str]
Models = dict[Pair, Path]

WAN21_T2V, WAN21_I2V = ("wan2.1", "t2v"), ("wan2.1", "i2v")
A14B_T2V, A14B_I2V = ("wan2.2-a14b", "t2v"), ("wan2.2-a14b", "i2v")
TI2V_5B_T2V, TI2V_5B_I2V = ("wan2.2-ti2v-5b", "t2v"), ("wan2.2-ti2v-5b", "i2v")
HUNYUAN = ("hunyuan-video", "t2v")
PUBLISHED = {
    WAN21_T2V: ("WanPipeline", None, False, 3.0),
    WAN21_I2V: ("WanImageToVideoPipeline", None, False, 3.0),
    A14B_T2V: ("WanPipeline", 0.875, False, 3.0),
    A14B_I2V: ("WanImageToVideoPipeline", 0.9, False, 3.0),
    TI2V_5B_T2V: ("WanPipeline", None, True, 5.0),
    TI2V_5B_I2V: ("WanPipeline", None, True, 5.0),
    HUNYUAN: ("HunyuanVideoPipeline", None, None, 7.0),
}
"""Class, boundary_ratio, expand_timesteps and the sampler's shift."""
CAPTIONS = (
    "a corgi runs on the beach",
    "two cubes",
    "Two cubes",
    "the video: 1. a cat's paw.",
    "日本 café — ½ 🎬",
    "\nred",
    " red",
    "",
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Every model of seed 0; no test changes them."""
    root = tmp_path_factory.mktemp("models")
    folders = {pair: root / "-".join(pair) for pair in PUBLISHED}
    for (family, task), folder in folders.items():
        write_tiny(folder, family=family, task=task)
    assert sorted(root.iterdir()) == sorted(folders.values())  # no temporary folder is left
    return folders


@pytest.fixture(scope="session")
def hunyuan(models: Models) -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline.from_pretrained(models[HUNYUAN])


def test_all_seven_pairs_are_there() -> None:
    assert set(BUILDERS) == set(PUBLISHED)


@pytest.mark.parametrize("pair", PUBLISHED, ids="-".join)
def test_a_folder_says_what_the_published_one_says(models: Models, pair: Pair) -> None:
    index = read(models[pair] / "model_index.json")
    scheduler = read(models[pair] / "scheduler/scheduler_config.json")
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    said = (index["_class_name"], index.get("boundary_ratio"), index.get("expand_timesteps"), shift)
    assert said == PUBLISHED[pair]


@pytest.mark.parametrize(
    ("pair", "pipeline", "size"),
    [
        (WAN21_T2V, WanPipeline, 32),
        (WAN21_I2V, WanImageToVideoPipeline, 32),
        (A14B_T2V, WanPipeline, 32),
        (A14B_I2V, WanImageToVideoPipeline, 32),
        (TI2V_5B_T2V, WanPipeline, 64),
        (TI2V_5B_I2V, WanImageToVideoPipeline, 64),
        (HUNYUAN, HunyuanVideoPipeline, 32),
    ],
)
def test_the_published_pipeline_samples(
    models: Models, pair: Pair, pipeline: type[DiffusionPipeline], size: int
) -> None:
    loaded = pipeline.from_pretrained(models[pair])
    loaded.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"prompt": "a red cube", "guidance_scale": 1.0}
    if pipeline is WanImageToVideoPipeline:
        pixels = np.random.default_rng(0).integers(256, size=(size, size, 3), dtype=np.uint8)
        given["image"] = Image.fromarray(pixels)
    video_BFHWC = loaded(
        **given,
        num_frames=9,
        height=size,
        width=size,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    assert video_BFHWC.shape == (1, 9, size, size, 3)
    assert np.isfinite(video_BFHWC).all()
    assert video_BFHWC.std() > 0.01


@pytest.mark.parametrize("pair", PUBLISHED, ids="-".join)
def test_a_model_is_tiny(models: Models, pair: Pair) -> None:
    parts = DiffusionPipeline.from_pretrained(models[pair]).components.values()
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) < 3e6
    assert sum(map(len, contents(models[pair]).values())) < 8e6


@pytest.mark.parametrize("pair", PUBLISHED, ids="-".join)
def test_the_seed_decides_every_byte(models: Models, pair: Pair, tmp_path: Path) -> None:
    family, task = pair
    write_tiny(tmp_path / "same", family=family, task=task, seed=0)
    write_tiny(tmp_path / "other", family=family, task=task, seed=1)
    first, same, other = map(contents, (models[pair], tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first.keys() == other.keys()
    weights = {name for name in first if name.endswith(".safetensors")}
    kept = {name for name in weights if first[name] == other[name]}
    trained = {"vae/diffusion_pytorch_model.safetensors"}
    assert kept == (trained if pair in (WAN21_T2V, WAN21_I2V, A14B_T2V, A14B_I2V) else set())


def test_the_callers_random_numbers_are_untouched(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_tiny(tmp_path / "model")
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_pair_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_tiny(tmp_path / "model", family="hunyuan-video", task="i2v")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pair", [A14B_T2V, A14B_I2V], ids="-".join)
def test_the_two_experts_differ(models: Models, pair: Pair) -> None:
    high, low = (
        WanTransformer3DModel.from_pretrained(models[pair] / name).state_dict()
        for name in ("transformer", "transformer_2")
    )
    assert high.keys() == low.keys()
    matrices = [key for key, value in high.items() if value.ndim > 1]
    assert not any(torch.equal(high[key], low[key]) for key in matrices)


def test_only_the_image_to_video_model_of_wan21_has_clip(models: Models) -> None:
    parts = {pair: read(folder / "model_index.json") for pair, folder in models.items()}
    assert {pair for pair, index in parts.items() if index.get("image_encoder", [None])[0]} == {
        WAN21_I2V
    }
    # The Hub's name: that of the fallback for machines without torchvision is not the one to save.
    assert parts[WAN21_I2V]["image_processor"] == ["transformers", "CLIPImageProcessor"]
    transformer = read(models[WAN21_I2V] / "transformer/config.json")
    encoder = CLIPVisionModel.from_pretrained(models[WAN21_I2V] / "image_encoder")
    with torch.no_grad():
        hidden = encoder(torch.zeros(1, 3, 224, 224), output_hidden_states=True).hidden_states[-2]
    assert hidden.shape == (1, 257, transformer["image_dim"])


@pytest.mark.parametrize("pair", [WAN21_T2V, TI2V_5B_T2V, HUNYUAN], ids="-".join)
def test_normalised_latents_are_of_order_one_and_tell_clips_apart(
    models: Models, pair: Pair
) -> None:
    latents_BCTYX = normalised_latents(models[pair] / "vae", moving_squares_BCFHW())
    variance = latents_BCTYX.var()
    assert 0.5 < variance.sqrt() < 2.0
    squares = (latents_BCTYX[1:] - latents_BCTYX[:-1]).square().mean((1, 2, 3, 4))
    assert (squares / variance).min() > 0.5  # 2 if the clips had nothing in common


def test_what_remains_of_the_hunyuan_prompt_is_the_caption(hunyuan: HunyuanVideoPipeline) -> None:
    template, crop = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    prefix = hunyuan.tokenizer(template.partition("{}")[0]).input_ids
    assert len(prefix) == crop == 95
    assert prefix[0] == hunyuan.tokenizer.bos_token_id
    for caption in CAPTIONS:
        tokens = hunyuan.tokenizer(template.format(caption)).input_ids
        assert tokens[:crop] == prefix
        assert hunyuan.tokenizer.decode(tokens[crop:]) == caption + "<|eot_id|>"


def test_the_first_hunyuan_embedding_is_of_the_captions_first_token(
    hunyuan: HunyuanVideoPipeline,
) -> None:
    captions = ["red cubes", "red balls", "blue cubes"]
    with torch.no_grad():
        text_BLD, _, mask_BL = hunyuan.encode_prompt(captions)
    assert mask_BL[:, 0].all() and not mask_BL[:, -1].any()  # padded on the right
    torch.testing.assert_close(text_BLD[0, 0], text_BLD[1, 0])
    assert (text_BLD[0, 0] - text_BLD[2, 0]).norm() > 0.1 * text_BLD[0, 0].norm()


def test_captions_differ_in_both_hunyuan_embeddings(hunyuan: HunyuanVideoPipeline) -> None:
    captions = [*CAPTIONS[:2], *CAPTIONS[3:6]]  # CLIP's tokenizer ignores case and spaces
    with torch.no_grad():
        text_BLD, pooled_BD, _ = hunyuan.encode_prompt(captions)
    assert pooled_BD.shape == (5, 8)
    for one in range(5):
        for other in range(one):
            assert (text_BLD[one] - text_BLD[other]).abs().max() > 0.1
            assert (pooled_BD[one] - pooled_BD[other]).abs().max() > 0.01


def test_no_caption_has_unknown_tokens(models: Models, hunyuan: HunyuanVideoPipeline) -> None:
    wan = DiffusionPipeline.from_pretrained(models[WAN21_T2V]).tokenizer
    clip = hunyuan.tokenizer_2
    for caption in CAPTIONS:
        assert wan.unk_token_id not in wan(caption).input_ids
        start, *middle, end = clip(caption).input_ids
        assert (start, end) == (clip.bos_token_id, clip.eos_token_id)
        assert end not in middle  # it is CLIP's unknown token, too
    for tokenizer in (wan, hunyuan.tokenizer):
        assert len({tuple(tokenizer(text).input_ids) for text in CAPTIONS}) == len(CAPTIONS)
    padded = clip("red " * 99, padding="max_length", truncation=True).input_ids
    assert len(padded) == 77


def moving_squares_BCFHW() -> Tensor:
    """6 clips of a coloured square on a coloured ground, in [-1, 1]."""
    generator = torch.Generator().manual_seed(7)
    clips = torch.empty(6, 3, 9, 64, 64)
    for index, clip in enumerate(clips):
        ground, square = 2 * torch.rand(2, 3, 1, 1, generator=generator) - 1
        clip[:] = ground[:, None] * torch.linspace(0.3, 1, 64)
        for frame in range(9):
            y, x = 8 * index + frame // 2, 3 * frame
            clip[:, frame, y : y + 20, x : x + 20] = square
    return clips


def normalised_latents(folder: Path, pixels_BCFHW: Tensor) -> Tensor:
    config = read(folder / "config.json")
    vae = (
        AutoencoderKLHunyuanVideo
        if config["_class_name"] == "AutoencoderKLHunyuanVideo"
        else AutoencoderKLWan
    ).from_pretrained(folder)
    with torch.no_grad():
        raw_BCTYX: Tensor = vae.encode(pixels_BCFHW).latent_dist.mode()
    if "scaling_factor" in config:
        return raw_BCTYX * float(config["scaling_factor"])
    mean, std = (torch.tensor(config[f"latents_{kind}"]) for kind in ("mean", "std"))
    return (raw_BCTYX - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def read(path: Path) -> Any:
    return json.loads(path.read_text())
