# SPDX-License-Identifier: Apache-2.0
"""Wan2.1, text-to-video and image-to-video: what a checkpoint holds and how it is conditioned.

torch is imported where a part is loaded: facts about files must be at hand without it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo.config.architectures import architecture
from fastvideo.config.recipe import Model
from fastvideo.errors import UserError
from fastvideo.models.detect import check
from fastvideo.models.family import (
    Adapt,
    Batch,
    Encoders,
    EncoderSettings,
    Interval,
    LatentStatistics,
    SamplerSettings,
    Text,
    pad_text,
    quiet_libraries,
)
from fastvideo.models.folder import files_of, read_config
from fastvideo.models.parts import (
    assemble,
    assemble_without_encoders,
    empty_part,
    load_part,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, WanTransformer3DModel
    from torch import Tensor, nn

    from fastvideo.models.execution import Execution


class Wan21:
    """The family ``wan2.1``; see ``fastvideo.models.family.Family`` for each method.

    Image-to-video appends a mask and the latent of [first frame, grey frames] to the noised
    latent, and attends to CLIP features of the first frame.
    """

    clean_frames = 0

    def __init__(self, model: Model) -> None:
        """``model`` is the recipe's."""
        self._model = model
        self._facts = architecture(model.family)
        self.pipeline = "WanImageToVideoPipeline" if model.task == "i2v" else "WanPipeline"

    def check(self, path: Path) -> None:
        """Refuse Wan2.2 and the other task, whose classes are the same."""
        check(path, self._model)

    def columns(self, path: Path) -> tuple[str, ...]:
        """CLIP features only where the transformer has ``image_dim``."""
        text_to_video = ("vae_latent", "text_embedding")
        if self._model.task == "t2v":
            return text_to_video
        clip = ("clip_feature",) if check(path, self._model).has_clip else ()
        return (*text_to_video, *clip, "first_frame_latent")

    def encoder_parts(self, path: Path) -> dict[str, list[Path]]:
        """Configurations and weights of the VAE, the text encoder and the tokenizer."""
        parts = {
            "vae": files_of(path, "vae"),
            "text": files_of(path, "text_encoder", "tokenizer"),
        }
        if "clip_feature" in self.columns(path):
            parts["image"] = files_of(path, "image_encoder", "image_processor")
        return parts

    def latent_statistics(self, path: Path) -> LatentStatistics:
        """Per-channel mean and standard deviation, 16 channels in Wan2.1."""
        config = read_config(path, "vae/config.json")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std)):
            raise UserError(
                f"model.path={path}: vae/config.json has no latents_mean and latents_std of one "
                "length; give the folder of a Wan model"
            )
        return LatentStatistics(tuple(mean), tuple(std))

    def flow_shift(self, path: Path) -> float:
        """3 in the published Wan2.1 and A14B checkpoints, 5 in TI2V-5B; Wan advises 5 at 720p."""
        config = read_config(path, "scheduler/scheduler_config.json")
        return float(config.get("flow_shift", config.get("shift", 1.0)))

    def interval(self, path: Path, *, folder: str) -> Interval:
        """All noise levels: there is one transformer."""
        return Interval()

    def upstream_text(self, path: Path, embedding_LD: "Tensor") -> Text:
        """It is UMT5's, without padding."""
        return Text(embedding_LD[: self._facts.text_tokens])

    def load_encoders(self, path: Path, *, settings: EncoderSettings) -> Encoders:
        """Load VAE, UMT5 and tokenizer, and CLIP's vision model where it is used."""
        from fastvideo.models.wan_encoders import WanEncoders

        return WanEncoders(path, settings, columns=self.columns(path), facts=self._facts)

    def load_transformer(
        self, path: Path, *, folder: str, dtype: str = "float32"
    ) -> "WanTransformer3DModel":
        """Load a transformer; training keeps float32 master weights."""
        from diffusers import WanTransformer3DModel

        quiet_libraries()
        model: WanTransformer3DModel = load_part(WanTransformer3DModel, path, folder, dtype=dtype)
        return model

    def empty_transformer(
        self, path: Path, *, folder: str, dtype: str = "float32"
    ) -> "WanTransformer3DModel":
        """Only the rotary tables have numbers."""
        from diffusers import WanTransformer3DModel

        model: WanTransformer3DModel = empty_part(WanTransformer3DModel, path, folder, dtype=dtype)
        rope = model.rope
        model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
        return model

    def arguments(self, batch: Batch) -> dict[str, "Tensor"]:
        """Text padded to 512 rows; for image-to-video 36 channels and CLIP features."""
        import torch

        from fastvideo.models import flow

        noised = flow.noised(batch.latents, batch.noise, batch.sigma)
        given = {
            "hidden_states": noised,
            "timestep": batch.sigma * flow.NUM_TRAIN_TIMESTEPS,
            "encoder_hidden_states": pad_text(batch.texts, length=self._facts.text_tokens),
        }
        if "first_frame_latent" in batch.images:
            image = batch.images["first_frame_latent"]
            mask = first_frame_mask(image, channels=self._facts.temporal_stride)
            given["hidden_states"] = torch.cat([noised, mask, image], dim=1)
        if "clip_feature" in batch.images:
            given["encoder_hidden_states_image"] = batch.images["clip_feature"]
        return given

    def attach(self, model: "nn.Module", how: "Execution") -> None:
        """Our own forward over diffusers' modules."""
        from fastvideo.models import wan_forward

        wan_forward.attach(model, how)

    def load_pipeline(
        self,
        path: Path,
        *,
        settings: SamplerSettings,
        transformers: Mapping[str, "ModelMixin"],
        adapt: Adapt | None = None,
    ) -> "DiffusionPipeline":
        """Load the pipeline; VAE and CLIP compute in float32, as Wan's own code does."""
        from fastvideo.models.wan_encoders import image_parts, text_parts

        quiet_libraries()
        parts = {
            **transformers,
            **text_parts(path, dtype=settings.dtype),
            **(image_parts(path) if "clip_feature" in self.columns(path) else {}),
            **self._decoder_parts(path),
        }
        for folder in self._facts.transformers:
            if folder not in parts:
                parts[folder] = self.load_transformer(path, folder=folder, dtype=settings.dtype)
        return assemble(self.pipeline, path, parts, settings=settings, adapt=adapt)

    def load_decoder(self, path: Path, *, settings: SamplerSettings) -> "DiffusionPipeline":
        """The VAE encodes first images, too."""
        parts = self._decoder_parts(path)
        return assemble_without_encoders(self.pipeline, path, parts, settings=settings)

    def _decoder_parts(self, path: Path) -> dict[str, Any]:
        from diffusers import AutoencoderKLWan

        quiet_libraries()
        return {
            "vae": load_part(AutoencoderKLWan, path, "vae", dtype="float32"),
            # Some conversions of Wan2.1 carry the boundary of experts that they do not have.
            "boundary_ratio": check(path, self._model).boundary,
        }

    def conditions(self, text: Text, negative: Text | None) -> dict[str, "Tensor"]:
        """Text padded to 512 rows."""
        length = self._facts.text_tokens
        found = {"prompt_embeds": pad_text([text], length=length)}
        if negative is not None:
            found["negative_prompt_embeds"] = pad_text([negative], length=length)
        return found


def first_frame_mask(latent_BCTYX: "Tensor", *, channels: int) -> "Tensor":
    """(B, ``channels``, T, Y, X): 1 in the first latent frame, 0 after it.

    The pipelines mark pixel frames and fold every four of them into channels; the first frame
    counts four times.
    """
    batch, _, *size = latent_BCTYX.shape
    mask = latent_BCTYX.new_zeros(batch, channels, *size)
    mask[:, :, 0] = 1
    return mask
