# SPDX-License-Identifier: Apache-2.0
"""What a diffusers folder is, from its configs alone; no torch, no weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.config.recipe import Model
from fastvideo.errors import UserError
from fastvideo.models.folder import read_config

WAN_PIPELINES = {"WanPipeline": "t2v", "WanImageToVideoPipeline": "i2v"}
CHANNELS = {16: "t2v", 36: "i2v"}
"""Of Wan's transformer: noised latent; and with 4 of the mask and 16 of the first frame."""
TI2V_CHANNELS = 48
HUNYUAN_CHANNELS = 16
NAMES = {"t2v": "text-to-video", "i2v": "image-to-video"}


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
        _check_hunyuan(path)
        return Checkpoint("hunyuan-video", ("t2v",), has_clip=False, boundary=None)
    if not isinstance(name, str) or name not in WAN_PIPELINES:  # a list names custom code
        raise UserError(
            f"model.path={path}: is a {name}, as the _class_name of its model_index.json says; "
            "give the folder of a Wan2.1 or Wan2.2 (text-to-video, image-to-video) or HunyuanVideo "
            "(text-to-video) model in diffusers format"
        )
    if index.get("expand_timesteps"):
        _check_ti2v(path)
        return Checkpoint("wan2.2-ti2v-5b", ("t2v", "i2v"), has_clip=False, boundary=None)
    task, has_clip = _wan_task(path, index)
    if not _present(index, "transformer_2"):
        # Some conversions of Wan2.1 carry a boundary_ratio; the second transformer tells.
        return Checkpoint("wan2.1", (task,), has_clip=has_clip, boundary=None)
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise UserError(
            f"model.path={path}: has two transformers, as Wan2.2 A14B has, but model_index.json "
            f"says boundary_ratio={boundary}, not a number between 0 and 1; fetch it again"
        )
    return Checkpoint("wan2.2-a14b", (task,), has_clip=has_clip, boundary=boundary)


def _check_hunyuan(path: Path) -> None:
    config = _transformer_config(path)
    if config is None:
        return
    kind = config.get("image_condition_type")
    channels = config.get("in_channels")
    if kind is not None:
        raise UserError(
            f"model.path={path}: its transformer takes images (image_condition_type={kind}); of "
            "HunyuanVideo this suite trains text-to-video models; give the folder of one"
        )
    if channels != HUNYUAN_CHANNELS:
        raise UserError(
            f"model.path={path}: its transformer takes {channels} channels (in_channels); of "
            f"HunyuanVideo this suite trains text-to-video models, with {HUNYUAN_CHANNELS}; give "
            "the folder of one"
        )
    if not config.get("guidance_embeds"):
        raise UserError(
            f"model.path={path}: its transformer has no guidance_embeds; of HunyuanVideo this "
            "suite trains the model that is distilled for guidance; give the folder of one"
        )


def _check_ti2v(path: Path) -> None:
    config = _transformer_config(path)
    channels = config.get("in_channels") if config else TI2V_CHANNELS
    if channels != TI2V_CHANNELS:
        raise UserError(
            f"model.path={path}: its transformer takes {channels} channels (in_channels); of the "
            f"models with expand_timesteps this suite trains Wan2.2 TI2V-5B, with {TI2V_CHANNELS}; "
            "give its folder"
        )


def _wan_task(path: Path, index: dict[str, Any]) -> tuple[str, bool]:
    """Task of a Wan model and whether it uses CLIP; of its transformer's config where it is."""
    task, config = WAN_PIPELINES[index["_class_name"]], _transformer_config(path)
    if config is None:
        return task, _present(index, "image_encoder")
    if config.get("pos_embed_seq_len") is not None:
        raise UserError(
            f"model.path={path}: takes a first and a last frame (its transformer has "
            "pos_embed_seq_len); this suite trains text-to-video and (first) image-to-video "
            "models; give the folder of one"
        )
    channels = config.get("in_channels")
    if not isinstance(channels, int) or channels not in CHANNELS:
        kinds = " or ".join(f"{count} ({NAMES[task]})" for count, task in CHANNELS.items())
        raise UserError(
            f"model.path={path}: its transformer takes {channels} channels (in_channels); this "
            f"suite trains Wan models with {kinds}; give the folder of one"
        )
    if CHANNELS[channels] != task:
        raise UserError(
            f"model.path={path}: its transformer takes {channels} channels, which is "
            f"{NAMES[CHANNELS[channels]]}, but model_index.json says {index['_class_name']}, which "
            f"is {NAMES[task]}; fetch it again"
        )
    return task, config.get("image_dim") is not None


def _transformer_config(path: Path) -> dict[str, Any] | None:
    """None where the folder is missing: preprocessing does without."""
    if not (path / "transformer").is_dir():
        return None
    return read_config(path, "transformer/config.json")


def _present(index: dict[str, Any], part: str) -> bool:
    """Whether the pipeline has a part; one that is left out is written as [null, null]."""
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
