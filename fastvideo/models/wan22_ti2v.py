# SPDX-License-Identifier: Apache-2.0
"""Wan2.2 TI2V-5B: one model for text-to-video and image-to-video, a timestep for every token.

Image-to-video keeps the first latent frame clean, at timestep 0, and out of the loss. It is the
video's own first latent frame, so that both tasks train on the same shards.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo.config.recipe import Model
from fastvideo.models.family import Batch
from fastvideo.models.wan21 import Wan21

if TYPE_CHECKING:
    from torch import Tensor


class Wan22TI2V(Wan21):
    """The family ``wan2.2-ti2v-5b``; see ``fastvideo.models.family.Family`` for each method."""

    def __init__(self, model: Model) -> None:
        """``model`` is the recipe's."""
        super().__init__(model)
        self.clean_frames = 1 if model.task == "i2v" else 0

    def columns(self, path: Path) -> tuple[str, ...]:
        """The same for both tasks."""
        return ("vae_latent", "text_embedding")

    def arguments(self, batch: Batch) -> dict[str, "Tensor"]:
        """Timesteps (B, S) of the S tokens, frame by frame; 0 for clean frames."""
        import torch

        given = super().arguments(batch)
        clean = self.clean_frames
        frames = torch.cat([batch.latents[:, :, :clean], given["hidden_states"][:, :, clean:]], 2)
        _, _, num_frames, height, width = frames.shape
        _, patch_y, patch_x = self._facts.patch_size
        timestep_BT = given["timestep"][:, None].repeat(1, num_frames)
        timestep_BT[:, :clean] = 0
        tokens_per_frame = (height // patch_y) * (width // patch_x)
        timestep_BS = timestep_BT.repeat_interleave(tokens_per_frame, dim=1)
        return {**given, "hidden_states": frames, "timestep": timestep_BS}
