# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the real architectures, random but for Wan2.1's trained VAE; CPU, seconds.

Axes: B clip, C channel, F pixel frame, H pixel row, W pixel column.
"""

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from fastvideo import atomic
from fastvideo.models.family import quiet_libraries
from fastvideo.models.tiny_configs import IMAGE_DIM, POOLED_DIM, TEXT_DIM, TRANSFORMERS
from fastvideo.models.tiny_tokenizers import clip_tokenizer, llama_tokenizer, t5_tokenizer


def write_tiny(folder: Path, *, family: str = "wan2.1", task: str = "t2v", seed: int = 0) -> None:
    """Write a complete model in diffusers format, 3 to 6 MB; the folder appears at once.

    Each has all parts of the published repositories of its family and task, of the same classes
    and options, with transformers of 0.6 to 1.3 M parameters; only the tokenizers' class is
    generic. All weights are random from ``seed``, except those of the VAE of Wan2.1 and Wan2.2
    A14B: it is the trained one of this package. The configurations of the other two, random VAEs
    state the statistics that their latents have.

    Raises:
        KeyError: No such pair of family and task.
    """
    build = BUILDERS[family, task]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = build()
    quiet_libraries()
    temporary = atomic.temporary_name(folder)
    atomic.sweep(folder)
    pipeline.save_pretrained(temporary)
    _name_as_published(temporary)
    temporary.rename(folder)


def tiny_vae() -> AutoencoderKLWan:
    """Load the trained VAE of 0.22 M parameters; ``tiny_vae/README.md`` says from what."""
    with as_file(files("fastvideo.models").joinpath("tiny_vae")) as folder:
        vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(folder, local_files_only=True)
    return vae


def _wan21_t2v() -> DiffusionPipeline:
    return WanPipeline(**_wan_parts(), transformer=_wan_transformer("wan2.1", "t2v"))


def _wan21_i2v() -> DiffusionPipeline:
    return WanImageToVideoPipeline(
        **_wan_parts(),
        image_processor=CLIPImageProcessorPil(),
        image_encoder=_clip_vision(),
        transformer=_wan_transformer("wan2.1", "i2v"),
    )


def _wan22_a14b_t2v() -> DiffusionPipeline:
    return WanPipeline(
        **_wan_parts(),
        transformer=_wan_transformer("wan2.2-a14b", "t2v"),
        transformer_2=_wan_transformer("wan2.2-a14b", "t2v"),
        boundary_ratio=0.875,
    )


def _wan22_a14b_i2v() -> DiffusionPipeline:
    """The published one has no CLIP, unlike Wan2.1's."""
    return WanImageToVideoPipeline(
        **_wan_parts(),
        transformer=_wan_transformer("wan2.2-a14b", "i2v"),
        transformer_2=_wan_transformer("wan2.2-a14b", "i2v"),
        boundary_ratio=0.9,
    )


def _wan22_ti2v_5b() -> DiffusionPipeline:
    """One folder for both tasks, text-to-video by its class, as published."""
    return WanPipeline(
        **_wan_parts(make_vae=_wan22_vae, flow_shift=5.0),
        transformer=_wan_transformer("wan2.2-ti2v-5b", "t2v"),
        expand_timesteps=True,
    )


def _hunyuan_t2v() -> DiffusionPipeline:
    tokenizer = llama_tokenizer()
    return HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=_llama(tokenizer),
        tokenizer_2=clip_tokenizer(),
        text_encoder_2=_clip_text(),
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=HunyuanVideoTransformer3DModel(**TRANSFORMERS["hunyuan-video", "t2v"]),
    )


BUILDERS: dict[tuple[str, str], Callable[[], DiffusionPipeline]] = {
    ("wan2.1", "t2v"): _wan21_t2v,
    ("wan2.1", "i2v"): _wan21_i2v,
    ("wan2.2-a14b", "t2v"): _wan22_a14b_t2v,
    ("wan2.2-a14b", "i2v"): _wan22_a14b_i2v,
    ("wan2.2-ti2v-5b", "t2v"): _wan22_ti2v_5b,
    ("wan2.2-ti2v-5b", "i2v"): _wan22_ti2v_5b,
    ("hunyuan-video", "t2v"): _hunyuan_t2v,
}


def _name_as_published(folder: Path) -> None:
    """Name the image processor as the Hub's folders do.

    The class that works without torchvision is saved under its own name. The Hub's name loads
    with and without torchvision. Tokenizers keep the generic class, for which tokenizer.json is
    all that counts; T5's and Llama's would put rules of their own in its place.
    """
    for path in (folder / "model_index.json", *folder.glob("image_processor/*.json")):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("CLIPImageProcessorPil", "CLIPImageProcessor"), "utf-8")


def _wan_parts(
    make_vae: Callable[[], AutoencoderKLWan] = tiny_vae, flow_shift: float = 3.0
) -> dict[str, Any]:
    """What every Wan model has; 3.0 is the shift that diffusers' conversion gives all but 5B."""
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _umt5(len(tokenizer)),
        "vae": make_vae(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=flow_shift,
        ),
    }


def _wan_transformer(family: str, task: str) -> WanTransformer3DModel:
    return WanTransformer3DModel(**TRANSFORMERS[family, task])


def _wan22_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    latents_BC = _latents_BC(vae)
    vae.register_to_config(
        latents_mean=[round(mean, 3) for mean in latents_BC.mean(0).tolist()],
        latents_std=[round(std, 3) for std in latents_BC.std(0).tolist()],
    )
    return vae


def _hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    vae.register_to_config(scaling_factor=round(1 / _latents_BC(vae).std().item(), 1))
    return vae


@torch.no_grad()
def _latents_BC(vae: Any) -> Tensor:
    """Make latents of a random VAE tell clips apart; return them, each place as one of B.

    A random encoder's biases are the same in all clips and outweigh what comes from the pixels.
    Statistics of what is returned are to be rounded: processors differ in the last digits.
    """
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    latents_BCTYX: Tensor = vae.encode(_clips_BCFHW()).latent_dist.mode()
    return latents_BCTYX.movedim(1, -1).flatten(0, -2)


def _clips_BCFHW() -> Tensor:
    """8 clips of smooth coloured patterns that drift, in [-1, 1]; the same every time."""
    generator = torch.Generator().manual_seed(0)
    colours = 0.4 * torch.randn(8, 3, 1, 1, generator=generator)
    patterns = 0.4 * torch.randn(8, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(patterns, scale_factor=8, mode="bicubic") + colours
    clips = [
        torch.stack([image.roll((way * frame, 2 * frame), (1, 2)) for frame in range(9)], dim=1)
        for way, image in enumerate(images, start=-4)
    ]
    return torch.stack(clips).clamp(-1, 1)


def _umt5(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=True,
    )
    return UMT5EncoderModel(config).eval()


def _llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=TEXT_DIM**-0.5,  # the usual 0.02 suits a width of thousands
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaModel(config).eval()


def _clip_text() -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_DIM,
        projection_dim=POOLED_DIM,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _clip_vision() -> CLIPVisionModel:
    """Sees 224 x 224 pixels as 257 tokens, as the published one."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        projection_dim=IMAGE_DIM,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config).eval()
