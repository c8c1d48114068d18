# SPDX-License-Identifier: Apache-2.0
"""Wan's frozen encoders in preprocessing: VAE mode latents, UMT5 text, CLIP's vision model.

Axes: F pixel frames, H, W pixels, C channels, T/Y/X latent frames, rows, columns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModel, UMT5EncoderModel

from fastvideo.config.architectures import Architecture
from fastvideo.models.family import EncoderSettings, LatentStatistics, Text, quiet_libraries
from fastvideo.models.folder import loading
from fastvideo.models.parts import load_part, load_tokenizer


class WanEncoders:
    """VAE, UMT5 and, where it is used, CLIP; see ``fastvideo.models.family.Encoders``."""

    def __init__(
        self,
        path: Path,
        settings: EncoderSettings,
        *,
        columns: Sequence[str],
        facts: Architecture,
    ) -> None:
        """Load what ``columns`` need."""
        quiet_libraries()
        self._device = torch.device(settings.device)
        self._columns, self._max_tokens = columns, facts.text_tokens
        vae = load_part(AutoencoderKLWan, path, "vae", dtype=settings.vae_dtype)
        self._vae = vae.to(self._device)
        config = self._vae.config
        self._statistics = LatentStatistics(tuple(config.latents_mean), tuple(config.latents_std))
        # The pipeline's own functions encode text and image: what training sees is what it gives.
        self._pipeline = WanImageToVideoPipeline(
            **text_parts(path, dtype=settings.text_dtype),
            **(image_parts(path) if "clip_feature" in columns else {}),
            vae=self._vae,
            scheduler=None,
        ).to(self._device)

    @torch.no_grad()
    def encode_video(self, frames_FHWC: npt.NDArray[np.uint8]) -> Mapping[str, Tensor]:
        """Encode one clip at a time, so that its bytes depend on nothing but itself."""
        latent = {"vae_latent": self._latent(frames_FHWC)}
        if "first_frame_latent" not in self._columns:
            return latent
        return {**latent, **self._conditions(frames_FHWC[0], num_frames=len(frames_FHWC))}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Text]:
        """Encode as the pipeline's ``encode_prompt`` does, then cut the padding's zero rows."""
        embeddings = []
        for caption in captions:
            padded_1LD, _ = self._pipeline.encode_prompt(
                caption,
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_tokens,
                device=self._device,
            )
            used = padded_1LD[0].ne(0).any(dim=1).nonzero()
            embeddings.append(Text(padded_1LD[0, : int(used.max()) + 1].cpu().clone()))
        return embeddings

    @torch.no_grad()
    def encode_image(
        self, image_HWC: npt.NDArray[np.uint8], *, num_frames: int
    ) -> Mapping[str, Tensor]:
        """As for a clip; without a place for the condition (TI2V-5B) the first latent frame."""
        if "first_frame_latent" in self._columns:
            return self._conditions(image_HWC, num_frames=num_frames)
        return {"first_frame_latent": self._normalised(image_HWC[None])}

    def _conditions(
        self, image_HWC: npt.NDArray[np.uint8], *, num_frames: int
    ) -> dict[str, Tensor]:
        """The normalised latent of the image followed by zeros, and its CLIP features."""
        found = {}
        if "clip_feature" in self._columns:
            embedding = self._pipeline.encode_image(Image.fromarray(image_HWC), self._device)
            found["clip_feature"] = embedding[0].cpu()
        return {**found, "first_frame_latent": self._normalised(image_HWC[None], pad=num_frames)}

    def _normalised(self, frames_FHWC: npt.NDArray[np.uint8], *, pad: int = 0) -> Tensor:
        return self._statistics.normalise(self._latent(frames_FHWC, pad=pad).float())

    def _latent(self, frames_FHWC: npt.NDArray[np.uint8], *, pad: int = 0) -> Tensor:
        """Raw mode (C, T, Y, X) of frames, followed by zeros (grey) up to ``pad`` frames."""
        frames = torch.from_numpy(frames_FHWC).to(self._device)
        pixels_CFHW = frames.permute(3, 0, 1, 2).float() / 255 * 2 - 1  # rounds as the pipelines do
        missing = max(0, pad - len(frames_FHWC))
        pixels_CFHW = torch.nn.functional.pad(pixels_CFHW, (0, 0, 0, 0, 0, missing))
        latent_1CTYX = self._vae.encode(pixels_CFHW[None].to(self._vae.dtype)).latent_dist.mode()
        mode: Tensor = latent_1CTYX[0].cpu()
        return mode


def text_parts(path: Path, *, dtype: str) -> dict[str, Any]:
    """UMT5 and its tokenizer."""
    return {
        "text_encoder": load_part(UMT5EncoderModel, path, "text_encoder", dtype=dtype),
        "tokenizer": load_tokenizer(path, "tokenizer"),
    }


def image_parts(path: Path) -> dict[str, Any]:
    """CLIP's vision model, float32 as in Wan's own code, and its image processor.

    Of the processors it is the one over PIL: the one over torchvision resizes otherwise, and would
    be taken wherever torchvision happens to be installed.
    """
    encoder = load_part(CLIPVisionModel, path, "image_encoder", dtype="float32")
    with loading(path, "image_processor"):
        processor = CLIPImageProcessorPil.from_pretrained(
            path, subfolder="image_processor", local_files_only=True
        )
    return {"image_encoder": encoder, "image_processor": processor}
