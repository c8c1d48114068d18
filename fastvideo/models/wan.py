# SPDX-License-Identifier: Apache-2.0
"""Wan2.1 text-to-video: what a checkpoint holds, and its parts loaded through diffusers.

torch is imported where a part is loaded: facts about files must be at hand without it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo.config.architectures import architecture
from fastvideo.errors import UserError
from fastvideo.models.family import (
    Encoders,
    EncoderSettings,
    LatentStatistics,
    loading,
    quiet_libraries,
    read_config,
)

if TYPE_CHECKING:
    from diffusers import WanPipeline, WanTransformer3DModel
    from torch import Tensor, nn


class Wan21:
    """The family ``wan2.1``; see ``fastvideo.models.family.Family`` for each method."""

    def check(self, path: Path) -> None:
        """Refuse Wan2.2 and image-to-video checkpoints, which have the same classes."""
        index = read_config(path, "model_index.json")
        if (index.get("transformer_2") or [None])[0] or index.get("expand_timesteps"):
            raise UserError(f"model.path={path}: is a Wan2.2 model; this version trains wan2.1")
        if not (path / "transformer").is_dir():
            return  # preprocessing does without
        config = read_config(path, "transformer/config.json")
        if config.get("image_dim") is not None or config.get("in_channels") != 16:
            raise UserError(
                f"model.path={path}: its transformer takes {config.get('in_channels')} channels "
                "and images; this version trains Wan2.1 text-to-video only"
            )

    def encoder_parts(self, path: Path) -> dict[str, list[Path]]:
        """Configurations and weights of the VAE, the text encoder and the tokenizer."""
        parts = {"vae": ("vae",), "text": ("text_encoder", "tokenizer")}
        return {part: [f for folder in parts[part] for f in _files(path, folder)] for part in parts}

    def latent_statistics(self, path: Path) -> LatentStatistics:
        """Per-channel mean and standard deviation, 16 channels in Wan2.1."""
        config = read_config(path, "vae/config.json")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std)):
            raise UserError(
                f"model.path={path}: vae/config.json has no latents_mean and latents_std of one "
                "length; give the folder of a Wan2.1 model"
            )
        return LatentStatistics(tuple(mean), tuple(std))

    def flow_shift(self, path: Path) -> float:
        """3 for 480p and 5 for 720p in the published checkpoints."""
        config = read_config(path, "scheduler/scheduler_config.json")
        return float(config.get("flow_shift", config.get("shift", 1.0)))

    def load_encoders(self, path: Path, *, settings: EncoderSettings) -> Encoders:
        """Load VAE, UMT5 and tokenizer."""
        from fastvideo.models.wan_encoders import WanEncoders

        return WanEncoders(path, settings)

    def load_transformer(self, path: Path, *, folder: str) -> "WanTransformer3DModel":
        """Load the transformer; training keeps float32 master weights."""
        import torch
        from diffusers import WanTransformer3DModel

        quiet_libraries()
        with loading(path, folder):
            model: WanTransformer3DModel = WanTransformer3DModel.from_pretrained(
                path, subfolder=folder, dtype=torch.float32, local_files_only=True
            )
        return model

    def predict(
        self,
        model: "nn.Module",
        *,
        noised_BCTYX: "Tensor",
        sigma_B: "Tensor",
        text: "Sequence[Tensor]",
        activation_checkpointing: bool,
    ) -> "Tensor":
        """Pad the text to the 512 rows the pipeline passes and run our forward."""
        from fastvideo.models import wan_forward
        from fastvideo.models.flow import NUM_TRAIN_TIMESTEPS

        return wan_forward.forward(
            model,
            latents_BCTYX=noised_BCTYX,
            timestep_B=sigma_B * NUM_TRAIN_TIMESTEPS,
            text_BLD=pad_text(text, length=architecture("wan2.1").text_tokens),
            activation_checkpointing=activation_checkpointing,
        )

    def load_pipeline(self, path: Path, *, dtype: str, device: str) -> "WanPipeline":
        """Load the whole pipeline; the VAE computes in float32, as Wan's own code does."""
        import torch
        from diffusers import AutoencoderKLWan, WanPipeline

        quiet_libraries()
        with loading(path, "pipeline"):
            vae = AutoencoderKLWan.from_pretrained(
                path, subfolder="vae", dtype=torch.float32, local_files_only=True
            )
            pipeline: WanPipeline = WanPipeline.from_pretrained(
                path, vae=vae, dtype=getattr(torch, dtype), local_files_only=True
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)


def pad_text(text: "Sequence[Tensor]", *, length: int) -> "Tensor":
    """Stack (L, D) embeddings to (B, ``length``, D); rows past the text are zero.

    The transformer has no text mask: zero rows take part in attention, so the length must be the
    pipeline's.
    """
    padded = text[0].new_zeros(len(text), length, text[0].shape[-1])
    for row, embedding_LD in zip(padded, text, strict=True):
        row[: len(embedding_LD)] = embedding_LD
    return padded


def _files(path: Path, folder: str) -> list[Path]:
    found = sorted(
        file
        for file in (path / folder).rglob("*")
        if file.is_file() and not file.name.startswith(".")
    )
    if not found:
        raise UserError(f"model.path={path}: has no {folder}/; give a whole diffusers folder")
    return found
