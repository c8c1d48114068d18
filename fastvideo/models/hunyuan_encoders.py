# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo's frozen encoders in preprocessing: VAE mode latents, LLaMA and CLIP text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

from fastvideo.config.architectures import Architecture
from fastvideo.models.family import EncoderSettings, Text, quiet_libraries
from fastvideo.models.folder import loading
from fastvideo.models.tokenizer import load_tokenizer


class HunyuanEncoders:
    """VAE, LLaMA and CLIP text; see ``fastvideo.models.family.Encoders``."""

    def __init__(self, path: Path, settings: EncoderSettings, *, facts: Architecture) -> None:
        """Load them."""
        quiet_libraries()
        self._device = torch.device(settings.device)
        self._max_tokens = facts.text_tokens
        with loading(path, "vae"):
            self._vae = AutoencoderKLHunyuanVideo.from_pretrained(
                path,
                subfolder="vae",
                dtype=getattr(torch, settings.vae_dtype),
                local_files_only=True,
            ).to(self._device)
        self._pipeline = HunyuanVideoPipeline(
            **_text_parts(path, settings), vae=self._vae, transformer=None, scheduler=None
        )

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


def _text_parts(path: Path, settings: EncoderSettings) -> dict[str, object]:
    dtype = getattr(torch, settings.text_dtype)
    with loading(path, "text encoders"):
        llama = LlamaModel.from_pretrained(
            path, subfolder="text_encoder", dtype=dtype, local_files_only=True
        )
        clip = CLIPTextModel.from_pretrained(
            path, subfolder="text_encoder_2", dtype=dtype, local_files_only=True
        )
    tokenizers = {name: load_tokenizer(path, name) for name in ("tokenizer", "tokenizer_2")}
    device = settings.device
    return {"text_encoder": llama.to(device), "text_encoder_2": clip.to(device), **tokenizers}
