# SPDX-License-Identifier: Apache-2.0
"""README.md of an exported model: what it is, how to load it, and from what it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastvideo import __version__
from fastvideo.config.recipe import Recipe

NAME = "README.md"
TASKS = {"t2v": "text-to-video", "i2v": "image-to-video"}


@dataclass(frozen=True)
class Training:
    """What the card says of a transformer that was trained."""

    marker: Mapping[str, Any]
    """Of the checkpoint."""
    recipe: str
    """YAML, as it was when this training was last started."""


def text(recipe: Recipe, *, base: Path, pipeline: str, trained: Mapping[str, Training]) -> str:
    """Write the card.

    Args:
        recipe: Of the export: model, clip size and how to sample.
        base: Folder of the base model; its card's licence is carried over.
        pipeline: Class of diffusers that loads the result.
        trained: By transformer, those that were trained.
    """
    head = {
        "library_name": "diffusers",
        "pipeline_tag": TASKS[recipe.model.task],
        "tags": [recipe.model.family, "finetuned", "fastvideo"],
        **_from_hub(recipe),
        **_licence(base),
    }
    rows = [_row(name, trained.get(name)) for name in recipe.architecture.transformers]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {recipe.run_dir.name}",
            "",
            f"{recipe.model.path}, finetuned for {TASKS[recipe.model.task]} with fastvideo "
            f"{__version__}.",
            "",
            "## How to load it",
            "",
            *_loading(recipe, pipeline),
            "",
            "## What it was trained on",
            "",
            "| transformer | step | samples seen | training clips | held-out clips |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *(line for name, training in trained.items() for line in _recipe(name, training)),
        ]
    )


def merged_text(base: str, folder: Path, loras: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write the card of a model that LoRAs were merged into.

    Args:
        base: The base model, as it was given.
        folder: Where it is; its card's licence is carried over.
        loras: By transformer, ``file``, ``scale`` and ``sha256`` of each.
    """
    head = {"library_name": "diffusers", "tags": ["lora", "fastvideo"], **_licence(folder)}
    rows = [
        f"| `{name}` | {Path(part['file']).name} | {part['scale']:g} | `{part['sha256']}` |"
        for name, parts in loras.items()
        for part in parts
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {Path(base).name} with LoRAs",
            "",
            f"The weights of {base} with these LoRAs added by fastvideo {__version__}:",
            "",
            "| transformer | LoRA | scale | SHA-256 |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _recipe(name: str, training: Training) -> list[str]:
    return [f"## Recipe of `{name}`", "", "```yaml", training.recipe.rstrip(), "```", ""]


def _row(name: str, training: Training | None) -> str:
    if training is None:
        return f"| `{name}` | not trained, the base model's | | | |"
    marker = training.marker
    step, samples, clips = marker["step"], marker["samples"], marker["clips"]
    return f"| `{name}` | {step} | {samples} | {clips['train']} | {clips['heldout']} |"


def _loading(recipe: Recipe, pipeline: str) -> list[str]:
    clip, spec = recipe.clip, recipe.generate
    given: dict[str, Any] = {
        "guidance_scale": spec.guidance_scale,
        "guidance_scale_2": spec.guidance_scale_2,
        "num_inference_steps": spec.num_inference_steps,
    }
    if spec.negative_prompt:
        given["negative_prompt"] = spec.negative_prompt
    settings = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
    shift = []
    if spec.flow_shift is not None:
        key = "shift" if recipe.architecture.embedded_guidance else "flow_shift"
        shift = [
            "pipe.scheduler = pipe.scheduler.from_config("
            f"pipe.scheduler.config, {key}={spec.flow_shift:g})"
        ]
    image = ["    image=load_image('first.png'),"] if recipe.model.task == "i2v" else []
    utilities = "export_to_video, load_image" if image else "export_to_video"
    return [
        "```python",
        "import torch",
        f"from diffusers import {pipeline}",
        f"from diffusers.utils import {utilities}",
        "",
        f"pipe = {pipeline}.from_pretrained('path/to/this/folder', dtype=torch.bfloat16)",
        "pipe.vae.to(torch.float32)  # as it was used to encode the clips",
        *shift,
        "video = pipe.to('cuda')(",
        *image,
        "    prompt='...',",
        f"    num_frames={clip.num_frames}, height={clip.height}, width={clip.width},",
        f"    {settings},",
        ").frames[0]",
        f"export_to_video(video, 'video.mp4', fps={clip.fps:g})",
        "```",
    ]


def _from_hub(recipe: Recipe) -> dict[str, str]:
    path = recipe.model.path
    return {} if Path(path).expanduser().exists() else {"base_model": path}


def _licence(base: Path) -> dict[str, Any]:
    """``license`` keys of the base model's card."""
    try:
        card = (base / NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: head[key] for key in keys if key in head} if isinstance(head, dict) else {}
