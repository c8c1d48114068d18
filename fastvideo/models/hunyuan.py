# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo, text-to-video: LLaMA text with a mask, CLIP's pooled text, guidance as an input.

torch is imported where a part is loaded: facts about files must be at hand without it.
"""

from collections.abc import Mapping, Sequence
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
    from diffusers import DiffusionPipeline, HunyuanVideoTransformer3DModel, ModelMixin
    from torch import Tensor, nn

    from fastvideo.models.execution import Execution

GUIDANCE_SCALE_UNIT = 1000.0
"""The transformer takes the guidance scale times this, embedded as a timestep is."""


class HunyuanVideo:
    """The family ``hunyuan-video``; see ``fastvideo.models.family.Family`` for each method."""

    pipeline = "HunyuanVideoPipeline"
    clean_frames = 0

    def __init__(self, model: Model, *, guidance: float) -> None:
        """``model`` is the recipe's; ``guidance`` the scale that training tells the model."""
        self._model, self._guidance = model, guidance
        self._facts = architecture(model.family)

    def check(self, path: Path) -> None:
        """Refuse other families, and image-conditioned transformers of this one."""
        check(path, self._model)

    def columns(self, path: Path) -> tuple[str, ...]:
        """CLIP's pooled text comes after upstream's columns."""
        return ("vae_latent", "text_embedding", "pooled_text_embedding")

    def encoder_parts(self, path: Path) -> dict[str, list[Path]]:
        """Configurations and weights of the VAE and of both text encoders with tokenizers."""
        text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return {"vae": files_of(path, "vae"), "text": files_of(path, *text)}

    def latent_statistics(self, path: Path) -> LatentStatistics:
        """One scaling factor for all channels: mean 0, standard deviation 1 / factor."""
        config = read_config(path, "vae/config.json")
        factor, channels = config.get("scaling_factor"), config.get("latent_channels")
        if not (isinstance(factor, float | int) and factor > 0 and isinstance(channels, int)):
            raise UserError(
                f"model.path={path}: vae/config.json has no scaling_factor and latent_channels; "
                "give the folder of a HunyuanVideo model"
            )
        return LatentStatistics((0.0,) * channels, (1.0 / factor,) * channels)

    def flow_shift(self, path: Path) -> float:
        """7 in the published checkpoint."""
        config = read_config(path, "scheduler/scheduler_config.json")
        return float(config.get("shift", 1.0))

    def interval(self, path: Path, *, folder: str) -> Interval:
        """All noise levels: there is one transformer."""
        return Interval()

    def upstream_text(self, path: Path, embedding_LD: "Tensor") -> Text:
        """Row 0 is CLIP's pooled text, filled up with zeros; LLaMA's rows follow."""
        width = read_config(path, "text_encoder_2/config.json")["hidden_size"]
        rows = embedding_LD[1 : 1 + self._facts.text_tokens]
        return Text(rows, pooled=embedding_LD[0, :width].clone())

    def load_encoders(self, path: Path, *, settings: EncoderSettings) -> Encoders:
        """Load VAE, LLaMA, CLIP's text model and their tokenizers."""
        from fastvideo.models.hunyuan_encoders import HunyuanEncoders

        return HunyuanEncoders(path, settings, facts=self._facts)

    def load_transformer(
        self, path: Path, *, folder: str, dtype: str = "float32"
    ) -> "HunyuanVideoTransformer3DModel":
        """Load the transformer; training keeps float32 master weights."""
        from diffusers import HunyuanVideoTransformer3DModel

        quiet_libraries()
        kind = HunyuanVideoTransformer3DModel
        model: HunyuanVideoTransformer3DModel = load_part(kind, path, folder, dtype=dtype)
        return model

    def empty_transformer(
        self, path: Path, *, folder: str, dtype: str = "float32"
    ) -> "HunyuanVideoTransformer3DModel":
        """No part of it is computed: its rotary tables are made in each forward."""
        from diffusers import HunyuanVideoTransformer3DModel

        kind = HunyuanVideoTransformer3DModel
        model: HunyuanVideoTransformer3DModel = empty_part(kind, path, folder, dtype=dtype)
        return model

    def arguments(self, batch: Batch) -> dict[str, "Tensor"]:
        """Text padded to 256 rows with a mask; the padding of the pipeline is masked as well."""
        import torch

        from fastvideo.models import flow

        text, mask, pooled = self._texts(batch.texts)
        return {
            "hidden_states": flow.noised(batch.latents, batch.noise, batch.sigma),
            "timestep": batch.sigma * flow.NUM_TRAIN_TIMESTEPS,
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "pooled_projections": pooled,
            "guidance": torch.full_like(batch.sigma, self._guidance * GUIDANCE_SCALE_UNIT),
        }

    def conditions(self, text: Text, negative: Text | None) -> dict[str, "Tensor"]:
        """Guidance is an input of the model: there is no negative prompt."""
        assert negative is None
        embeddings, mask, pooled = self._texts([text])
        return {
            "prompt_embeds": embeddings,
            "prompt_attention_mask": mask,
            "pooled_prompt_embeds": pooled,
        }

    def _texts(self, texts: Sequence[Text]) -> tuple["Tensor", "Tensor", "Tensor"]:
        """Embeddings (B, 256, D), their mask (B, 256) and the pooled text (B, P)."""
        import torch

        padded = pad_text(texts, length=self._facts.text_tokens)
        lengths = padded.new_tensor([len(text.embedding) for text in texts])
        places = torch.arange(self._facts.text_tokens, device=padded.device)
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return padded, (places < lengths[:, None]).to(padded.dtype), torch.stack(pooled)

    def attach(self, model: "nn.Module", how: "Execution") -> None:
        """Our own forward over diffusers' modules."""
        from fastvideo.models import hunyuan_forward

        hunyuan_forward.attach(model, how)

    def load_pipeline(
        self,
        path: Path,
        *,
        settings: SamplerSettings,
        transformers: Mapping[str, "ModelMixin"],
        adapt: Adapt | None = None,
    ) -> "DiffusionPipeline":
        """Load the pipeline; the VAE computes in float32."""
        from fastvideo.models.hunyuan_encoders import text_parts

        quiet_libraries()
        parts = {
            **transformers,
            **text_parts(path, dtype=settings.dtype),
            **self._decoder_parts(path),
        }
        if "transformer" not in parts:
            parts["transformer"] = self.load_transformer(
                path, folder="transformer", dtype=settings.dtype
            )
        return assemble(self.pipeline, path, parts, settings=settings, adapt=adapt)

    def load_decoder(self, path: Path, *, settings: SamplerSettings) -> "DiffusionPipeline":
        """The VAE computes in float32."""
        parts = self._decoder_parts(path)
        return assemble_without_encoders(self.pipeline, path, parts, settings=settings)

    def _decoder_parts(self, path: Path) -> dict[str, Any]:
        from diffusers import AutoencoderKLHunyuanVideo

        quiet_libraries()
        return {"vae": load_part(AutoencoderKLHunyuanVideo, path, "vae", dtype="float32")}
