# SPDX-License-Identifier: Apache-2.0
"""What a model family must provide to the rest of the suite, and how one is found.

Axes: F pixel frames, C latent channels, T/Y/X latent frames, rows, columns, L text tokens, D text
dimension, B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

    from fastvideo.models.execution import Execution


ENCODE_VERSION = 1
"""Counts changes of how captions, pictures and clips are given to the encoders."""


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, as the VAE's configuration says."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, raw_BCTYX: "torch.Tensor") -> "torch.Tensor":
        """Return ``(raw - mean) * (1 / std)``; the product, not a quotient, as the pipelines do."""
        return (raw_BCTYX - self._column(self.mean, raw_BCTYX)) * (
            1.0 / self._column(self.std, raw_BCTYX)
        )

    def denormalise(self, normalised_BCTYX: "torch.Tensor") -> "torch.Tensor":
        """Return the raw latent that `normalise` takes."""
        std = self._column(self.std, normalised_BCTYX)
        return normalised_BCTYX * std + self._column(self.mean, normalised_BCTYX)

    @staticmethod
    def _column(values: tuple[float, ...], like: "torch.Tensor") -> "torch.Tensor":
        return like.new_tensor(values).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Text:
    """A caption as the transformer takes it."""

    embedding: "torch.Tensor"
    """(L, D), valid tokens only."""
    pooled: "torch.Tensor | None" = None
    """(P,), where the model has a second text encoder."""


def pad_text(texts: Sequence[Text], *, length: int) -> "torch.Tensor":
    """Stack (L, D) embeddings to (B, ``length``, D); rows past the text are zero.

    Wan's transformer has no text mask: zero rows take part in attention, so the length must be the
    pipeline's.
    """
    first = texts[0].embedding
    padded = first.new_zeros(len(texts), length, first.shape[-1])
    for row, text in zip(padded, texts, strict=True):
        row[: len(text.embedding)] = text.embedding
    return padded


@dataclass(frozen=True)
class Batch:
    """Samples of a training step, on the device, float32."""

    latents: "torch.Tensor"
    """(B, C, T, Y, X), normalised."""
    noise: "torch.Tensor"
    """(B, C, T, Y, X)."""
    sigma: "torch.Tensor"
    """(B,)."""
    texts: tuple[Text, ...]
    images: "Mapping[str, torch.Tensor]"
    """What the first frame became, by column: ``first_frame_latent`` (B, C, T, Y, X), normalised,
    and ``clip_feature`` (B, 257, D); empty for models that need neither."""


@dataclass(frozen=True)
class Interval:
    """The noise levels ``low <= sigma < high`` of one expert; the whole range with one model."""

    low: float = 0.0
    high: float = 1.0


class Encoders(Protocol):
    """The frozen models of preprocessing."""

    def encode_video(self, frames_FHWC: "npt.NDArray[np.uint8]") -> "Mapping[str, torch.Tensor]":
        """Return the tensors of a clip by column name; ``vae_latent`` (C, T, Y, X) is raw."""

    def encode_text(self, captions: Sequence[str]) -> list[Text]:
        """Encode captions one by one."""

    def encode_image(
        self, image_HWC: "npt.NDArray[np.uint8]", *, num_frames: int
    ) -> "Mapping[str, torch.Tensor]":
        """Return what a first image of a video of ``num_frames`` gives to sampling, by column."""


@dataclass(frozen=True)
class EncoderSettings:
    """How the encoders compute."""

    vae_dtype: str
    text_dtype: str
    device: str


@dataclass(frozen=True)
class SamplerSettings:
    """How a pipeline computes; see ``fastvideo.config.recipe.Generate``."""

    dtype: str
    device: str
    offload: str = "none"
    vae_tiling: bool = False
    flow_shift: float | None = None


Adapt = Callable[["DiffusionPipeline"], None]
"""Changes a loaded pipeline in place."""


class Family(Protocol):
    """One architecture and task: everything that differs between the models of this suite."""

    pipeline: str
    """Class of diffusers that samples the task."""
    clean_frames: int
    """Latent frames at the start that are given clean and stay out of the loss."""

    def check(self, path: Path) -> None:
        """Refuse a checkpoint of another family or task with a ``UserError``; needs no torch."""

    def columns(self, path: Path) -> tuple[str, ...]:
        """Tensors a training sample is made of, by column, as the checkpoint's configs say."""

    def encoder_parts(self, path: Path) -> dict[str, list[Path]]:
        """Files that decide what the encoders compute, by part (``vae``, ``text``, ``image``)."""

    def latent_statistics(self, path: Path) -> LatentStatistics:
        """Read them from the VAE's configuration, without weights."""

    def flow_shift(self, path: Path) -> float:
        """The shift of the checkpoint's own sampler."""

    def interval(self, path: Path, *, folder: str) -> Interval:
        """The noise levels that the transformer in ``folder`` denoises."""

    def upstream_text(self, path: Path, embedding_LD: "torch.Tensor") -> Text:
        """Take apart what upstream FastVideo's Parquet has as ``text_embedding``."""

    def load_encoders(self, path: Path, *, settings: EncoderSettings) -> Encoders:
        """Load VAE, text encoders and, where the model uses one, the image encoder."""

    def load_transformer(self, path: Path, *, folder: str, dtype: str = "float32") -> "ModelMixin":
        """Load one transformer; diffusers keeps some of its parts in float32."""

    def empty_transformer(self, path: Path, *, folder: str, dtype: str = "float32") -> "ModelMixin":
        """Build what `load_transformer` loads, without reading weights.

        What is loaded is on the meta device, what is computed has its numbers; see
        ``fastvideo.models.weights`` for what comes next.
        """

    def arguments(self, batch: Batch) -> "dict[str, torch.Tensor]":
        """Noise the batch; the result is what the pipeline passes to its transformer, by name."""

    def attach(self, model: "torch.nn.Module", how: "Execution") -> None:
        """Make ``model(**arguments)`` run our forward: the flow (B, C, T, Y, X)."""

    def load_pipeline(
        self,
        path: Path,
        *,
        settings: SamplerSettings,
        transformers: "Mapping[str, ModelMixin]",
        adapt: "Adapt | None" = None,
    ) -> "DiffusionPipeline":
        """Load the diffusers pipeline of the task, ``transformers`` instead of the folder's.

        ``adapt`` changes it on the host, before it goes to its device or is offloaded.
        """

    def load_decoder(self, path: Path, *, settings: SamplerSettings) -> "DiffusionPipeline":
        """Load that pipeline with VAE and scheduler only; see ``fastvideo.models.denoiser``."""

    def conditions(self, text: Text, negative: Text | None) -> "dict[str, torch.Tensor]":
        """What the pipeline takes in place of a prompt and, for guidance, a negative one.

        Tensors of one sample, padded as the pipeline's own text encoder leaves them; their device
        and dtype are those of the texts.
        """


def find_family(recipe: Recipe) -> Family:
    """Return the family and task that a recipe names."""
    model = recipe.model
    if model.family == "wan2.1":
        from fastvideo.models.wan21 import Wan21

        return Wan21(model)
    if model.family == "wan2.2-a14b":
        from fastvideo.models.wan22_a14b import Wan22A14B

        return Wan22A14B(model)
    if model.family == "wan2.2-ti2v-5b":
        from fastvideo.models.wan22_ti2v import Wan22TI2V

        return Wan22TI2V(model)
    assert model.family == "hunyuan-video"
    from fastvideo.models.hunyuan import HunyuanVideo

    return HunyuanVideo(model, guidance=recipe.train.guidance or 1.0)


def quiet_libraries() -> None:
    """Keep the progress bars of diffusers and transformers out of our logs."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def pick_device(wanted: str) -> str:
    """Turn ``auto`` into ``cuda`` or ``cpu``; refuse ``cuda`` where there is none."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; use device=cpu, or a GPU node")
    return wanted
