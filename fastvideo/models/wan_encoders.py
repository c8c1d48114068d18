# SPDX-License-Identifier: Apache-2.0
"""Wan2.1's frozen encoders in preprocessing: VAE mode latents and UMT5 text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from fastvideo.config.architectures import architecture
from fastvideo.models.family import EncoderSettings, loading, quiet_libraries


class WanEncoders:
    """VAE, UMT5 and tokenizer of a Wan2.1 folder; see ``fastvideo.models.family.Encoders``."""

    def __init__(self, path: Path, settings: EncoderSettings) -> None:
        """Load them."""
        quiet_libraries()
        self._device = torch.device(settings.device)
        with loading(path, "vae"):
            vae = AutoencoderKLWan.from_pretrained(
                path,
                subfolder="vae",
                dtype=getattr(torch, settings.vae_dtype),
                local_files_only=True,
            )
        with loading(path, "text encoder"):
            text_encoder = UMT5EncoderModel.from_pretrained(
                path,
                subfolder="text_encoder",
                dtype=getattr(torch, settings.text_dtype),
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                path, subfolder="tokenizer", local_files_only=True
            )
        self._vae = vae.to(self._device)
        self._text = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder.to(self._device),
            vae=self._vae,
            scheduler=None,
        )
        self._max_tokens = architecture("wan2.1").text_tokens

    @torch.no_grad()
    def encode_video(self, frames_FHWC: npt.NDArray[np.uint8]) -> Mapping[str, Tensor]:
        """Encode one clip at a time, so that its bytes depend on nothing but itself."""
        frames = torch.from_numpy(frames_FHWC).to(self._device)
        pixels_1CFHW = frames.permute(3, 0, 1, 2)[None].to(self._vae.dtype) / 127.5 - 1.0
        latent_1CTYX = self._vae.encode(pixels_1CFHW).latent_dist.mode()
        return {"vae_latent": latent_1CTYX[0].cpu()}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """Encode as ``WanPipeline.encode_prompt`` does, then cut the zero rows of the padding."""
        embeddings = []
        for caption in captions:
            padded_1LD, _ = self._text.encode_prompt(
                caption,
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_tokens,
                device=self._device,
            )
            used = padded_1LD[0].ne(0).any(dim=1).nonzero()
            embeddings.append(padded_1LD[0, : int(used.max()) + 1].cpu().clone())
        return embeddings
