# SPDX-License-Identifier: Apache-2.0
"""What a diffusers folder is, from its configs alone; no torch, no weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.config.recipe import Model
from fastvideo.errors import UserError
from fastvideo.models.folder import read_config

WAN_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
PLAIN_CHANNELS, IMAGE_CHANNELS = 16, 36
"""Of Wan's transformer: noised latent; and with 4 of the mask and 16 of the first frame."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder in the words of a recipe."""

    family: str
    tasks: tuple[str, ...]
    has_clip: bool
    """Whether the transformer attends to CLIP features of the first frame."""
    boundary: float | None
    """Sigma from which the high-noise expert denoises; None with one transformer."""


def check(path: Path, model: Model) -> Checkpoint:
    """Return what ``path`` holds if it is the recipe's ``model``.

    Raises:
        UserError: It is another family's or another task's, with the recipe's way out.
    """
    found = detect(path)
    if found.family != model.family:
        raise UserError(
            f"model.path={path}: is a {found.family} model, the recipe says model.family="
            f"{model.family}; write model.family: {found.family}, or give another path"
        )
    if model.task not in found.tasks:
        raise UserError(
            f"model.path={path}: is a model for {' and '.join(found.tasks)}, the recipe says "
            f"model.task={model.task}; write model.task: {found.tasks[0]}, or give the path of a "
            f"{model.task} model"
        )
    return found


def detect(path: Path) -> Checkpoint:
    """Find out the family and task of a folder; the transformer's own folder may be missing.

    Raises:
        UserError: It is none that this suite trains, or parts contradict each other.
    """
    index = read_config(path, "model_index.json")
    name = index.get("_class_name")
    if name == "HunyuanVideoPipeline":
        _refuse_image_conditions(path)
        return Checkpoint("hunyuan-video", ("t2v",), has_clip=False, boundary=None)
    if name not in WAN_PIPELINES:
        raise UserError(
            f"model.path={path}: is a {name}; this suite trains Wan2.1, Wan2.2 and HunyuanVideo "
            "text-to-video models in diffusers format"
        )
    if index.get("expand_timesteps"):
        return Checkpoint("wan2.2-ti2v-5b", ("t2v", "i2v"), has_clip=False, boundary=None)
    task, has_clip = _wan_task(path, index)
    if not _present(index, "transformer_2"):
        # Some conversions of Wan2.1 carry a boundary_ratio; the second transformer tells.
        return Checkpoint("wan2.1", (task,), has_clip=has_clip, boundary=None)
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, float | int) or not 0 < boundary < 1:
        raise UserError(
            f"model.path={path}: has two transformers, but model_index.json has no boundary_ratio "
            "between 0 and 1; fetch it again"
        )
    return Checkpoint("wan2.2-a14b", (task,), has_clip=has_clip, boundary=float(boundary))


def _refuse_image_conditions(path: Path) -> None:
    if not (path / "transformer").is_dir():
        return
    kind = read_config(path, "transformer/config.json").get("image_condition_type")
    if kind is not None:
        raise UserError(
            f"model.path={path}: its transformer takes images (image_condition_type={kind}); of "
            "HunyuanVideo this suite trains text-to-video models"
        )


def _wan_task(path: Path, index: dict[str, Any]) -> tuple[str, bool]:
    """Task of a Wan model and whether it uses CLIP; of its transformer's config where it is."""
    if not (path / "transformer").is_dir():  # preprocessing does without
        is_i2v = index["_class_name"] == "WanImageToVideoPipeline"
        return "i2v" if is_i2v else "t2v", _present(index, "image_encoder")
    config = read_config(path, "transformer/config.json")
    channels = config.get("in_channels")
    if config.get("pos_embed_seq_len") is not None:
        raise UserError(
            f"model.path={path}: takes a first and a last frame; this suite trains text-to-video "
            "and (first) image-to-video models"
        )
    tasks = {PLAIN_CHANNELS: "t2v", IMAGE_CHANNELS: "i2v"}
    if channels not in tasks:
        raise UserError(
            f"model.path={path}: its transformer takes {channels} channels; this suite trains "
            f"models with {PLAIN_CHANNELS} (text-to-video) or {IMAGE_CHANNELS} (image-to-video)"
        )
    return tasks[channels], config.get("image_dim") is not None


def _present(index: dict[str, Any], part: str) -> bool:
    """Whether the pipeline has a part; one that is left out is written as [null, null]."""
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
