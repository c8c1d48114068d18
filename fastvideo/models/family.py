# SPDX-License-Identifier: Apache-2.0
"""What a model family must provide to the rest of the suite, and how one is found.

Axes: F pixel frames, C latent channels, T/Y/X latent frames, rows, columns, L text tokens, D text
dimension, B batch.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fastvideo.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin


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

    @staticmethod
    def _column(values: tuple[float, ...], like: "torch.Tensor") -> "torch.Tensor":
        return like.new_tensor(values).view(-1, 1, 1, 1)


class Encoders(Protocol):
    """The frozen models of preprocessing."""

    def encode_video(self, frames_FHWC: npt.NDArray[np.uint8]) -> "Mapping[str, torch.Tensor]":
        """Return the tensors of a clip by column name; ``vae_latent`` (C, T, Y, X) is raw."""

    def encode_text(self, captions: Sequence[str]) -> "list[torch.Tensor]":
        """Return (L, D) of each caption, valid tokens only."""


@dataclass(frozen=True)
class EncoderSettings:
    """How the encoders compute."""

    vae_dtype: str
    text_dtype: str
    device: str


class Family(Protocol):
    """One architecture: everything that differs between Wan2.1, Wan2.2 and HunyuanVideo."""

    def check(self, path: Path) -> None:
        """Refuse a checkpoint of another architecture with a ``UserError``; needs no torch."""

    def encoder_parts(self, path: Path) -> dict[str, list[Path]]:
        """Files that decide what the encoders compute, by part (``vae``, ``text``)."""

    def latent_statistics(self, path: Path) -> LatentStatistics:
        """Read them from the VAE's configuration, without weights."""

    def flow_shift(self, path: Path) -> float:
        """The shift of the checkpoint's own sampler."""

    def load_encoders(self, path: Path, *, settings: EncoderSettings) -> Encoders:
        """Load VAE and text encoder."""

    def load_transformer(self, path: Path, *, folder: str) -> "ModelMixin":
        """Load one transformer, all weights float32."""

    def predict(
        self,
        model: "torch.nn.Module",
        *,
        noised_BCTYX: "torch.Tensor",
        sigma_B: "torch.Tensor",
        text: "Sequence[torch.Tensor]",
        activation_checkpointing: bool,
    ) -> "torch.Tensor":
        """Predict the flow (B, C, T, Y, X); ``text`` holds (L, D) of each sample, not padded."""

    def load_pipeline(self, path: Path, *, dtype: str, device: str) -> "DiffusionPipeline":
        """Load the diffusers pipeline; the VAE stays float32."""


def find_family(name: str) -> Family:
    """Return the family called ``name`` in recipes."""
    if name == "wan2.1":
        from fastvideo.models.wan import Wan21

        return Wan21()
    raise AssertionError(name)  # the recipe has checked it


def find_model(path: str) -> Path:
    """Return the folder of a model: a local one, or a snapshot of a Hugging Face repository.

    Raises:
        UserError: There is no such folder, and the Hub has it not or cannot be reached.
    """
    folder = Path(path).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"model.path={path}: has no model_index.json; give a diffusers folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path, re.ASCII):
        raise UserError(f"model.path={path}: there is no such folder")
    return _from_hub(path)


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.path={repository}: neither a folder here nor in the Hugging Face cache, and "
            f"the Hub did not give it ({reason}); fetch it where there is a network with "
            f"`hf download {repository}`, or write the path of a folder"
        ) from None


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a model folder."""
    try:
        config = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model.path={path}: has no {name}; give a whole diffusers folder"
        ) from None
    except ValueError as error:
        raise UserError(f"model.path={path}: {name} is damaged ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"model.path={path}: {name} is damaged (no table); fetch it again")
    return config


@contextlib.contextmanager
def loading(path: Path, part: str) -> Iterator[None]:
    """Turn what the libraries raise on a missing, cut or foreign part into a ``UserError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.path={path}: its {part} cannot be loaded ({reason}); fetch it again, or give "
            "a whole diffusers folder of the recipe's model.family"
        ) from error


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
