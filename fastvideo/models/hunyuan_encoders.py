# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo's frozen encoders in preprocessing: VAE mode latents, LLaMA and CLIP text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

from fastvideo.config.architectures import Architecture
from fastvideo.models.family import EncoderSettings, Text, quiet_libraries
from fastvideo.models.parts import load_part, load_tokenizer


class HunyuanEncoders:
    """VAE, LLaMA and CLIP text; see ``fastvideo.models.family.Encoders``."""

    def __init__(self, path: Path, settings: EncoderSettings, *, facts: Architecture) -> None:
        """Load them."""
        quiet_libraries()
        self._device = torch.device(settings.device)
        self._max_tokens = facts.text_tokens
        self._vae = load_part(AutoencoderKLHunyuanVideo, path, "vae", dtype=settings.vae_dtype)
        self._pipeline = HunyuanVideoPipeline(
            **text_parts(path, dtype=settings.text_dtype),
            vae=self._vae,
            transformer=None,
            scheduler=None,
        ).to(self._device)

    @torch.no_grad()
    def encode_video(self, frames_FHWC: npt.NDArray[np.uint8]) -> Mapping[str, Tensor]:
        """Encode one clip at a time, so that its bytes depend on nothing but itself."""
        frames = torch.from_numpy(frames_FHWC).to(self._device)
        pixels_1CFHW = frames.permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
        latent_1CTYX = self._vae.encode(pixels_1CFHW.to(self._vae.dtype)).latent_dist.mode()
        return {"vae_latent": latent_1CTYX[0].cpu()}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Text]:
        """Encode as the pipeline's ``encode_prompt`` does, then cut what its mask leaves out."""
        texts = []
        for caption in captions:
            padded_1LD, pooled_1P, mask_1L = self._pipeline.encode_prompt(
                caption, max_sequence_length=self._max_tokens, device=self._device
            )
            embedding_LD = padded_1LD[0, : int(mask_1L[0].sum())]
            texts.append(Text(embedding_LD.cpu().clone(), pooled_1P[0].cpu().clone()))
        return texts

    def encode_image(
        self, image_HWC: npt.NDArray[np.uint8], *, num_frames: int
    ) -> Mapping[str, Tensor]:
        """Never asked for: the recipe refuses image-to-video."""
        raise AssertionError("HunyuanVideo is text-to-video here")


def text_parts(path: Path, *, dtype: str) -> dict[str, Any]:
    """LLaMA, CLIP's text model and their tokenizers."""
    return {
        "text_encoder": load_part(LlamaModel, path, "text_encoder", dtype=dtype),
        "text_encoder_2": load_part(CLIPTextModel, path, "text_encoder_2", dtype=dtype),
        **{name: load_tokenizer(path, name) for name in ("tokenizer", "tokenizer_2")},
    }
