# SPDX-License-Identifier: Apache-2.0
"""README.md of an exported model: what it is, how to load it, and from what it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastvideo import __version__, state
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora

NAME = "README.md"
TASKS = {"t2v": "text-to-video", "i2v": "image-to-video"}


@dataclass(frozen=True)
class Training:
    """What the card says of a transformer that was trained."""

    marker: Mapping[str, Any]
    """Of the checkpoint."""
    recipe: str
    """YAML, as it was when this training was last started."""

    @property
    def has_norms(self) -> bool:
        """Whether norms trained beside adapters."""
        return bool(self.marker["about"].get("settings", {}).get("norms"))


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
        "tags": [recipe.model.family, "lora" if _is_lora(recipe) else "finetuned", "fastvideo"],
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
            f"{_what(recipe)} for {TASKS[recipe.model.task]}, made with fastvideo {__version__}.",
            "",
            "## How to load it",
            "",
            *_loading(recipe, pipeline, trained),
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


def _is_lora(recipe: Recipe) -> bool:
    return isinstance(recipe.train.method, Lora)


def _what(recipe: Recipe) -> str:
    averaged = " (averaged weights)" if recipe.averaged else ""
    if _is_lora(recipe):
        return f"A LoRA{averaged} of {_base_name(recipe)}"
    return f"{_base_name(recipe)}, finetuned{averaged}"


def _loading(recipe: Recipe, pipeline: str, trained: Mapping[str, Training]) -> list[str]:
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
        *_norm_imports(trained),
        "",
        f"pipe = {pipeline}.from_pretrained({_folder(recipe)!r}, dtype=torch.bfloat16)",
        *_lora_loading(recipe, trained),
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


def _folder(recipe: Recipe) -> str:
    if not _is_lora(recipe):
        return "path/to/this/folder"
    return recipe.model.path if _from_hub(recipe) else f"path/to/{_base_name(recipe)}"


def _base_name(recipe: Recipe) -> str:
    """The id of a model on the Hub, or of a folder its last name: where it lay is nobody's."""
    path = recipe.model.path
    return path if _from_hub(recipe) else Path(path).name


def _norm_imports(trained: Mapping[str, Training]) -> list[str]:
    has_norms = any(training.has_norms for training in trained.values())
    return ["from safetensors.torch import load_file"] if has_norms else []


def _lora_loading(recipe: Recipe, trained: Mapping[str, Training]) -> list[str]:
    """Load the LoRA of each transformer, and the norms that trained beside it."""
    if not _is_lora(recipe):
        return []
    lines = []
    for name, training in trained.items():
        second = ", load_into_transformer_2=True" if name != "transformer" else ""
        file = state.LORA_FILES[name]
        lines.append(f"pipe.load_lora_weights('path/to/this/folder', weight_name={file!r}{second})")
        if training.has_norms:
            norms = f"load_file('path/to/this/folder/{state.NORM_FILES[name]}')"
            lines.append(f"pipe.{name}.load_state_dict({norms}, strict=False)")
    return lines


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
