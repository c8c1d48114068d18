# SPDX-License-Identifier: Apache-2.0
"""README.md of an exported model: what it is, how to load it, and from what it was made."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastvideo import __version__
from fastvideo.config.recipe import Recipe

NAME = "README.md"
TASKS = {"t2v": "text-to-video", "i2v": "image-to-video"}


def text(recipe: Recipe, *, base: Path, pipeline: str, trained: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        recipe: The recipe, printed in full.
        base: Folder of the base model; its card's licence is carried over.
        pipeline: Class of diffusers that loads the result.
        trained: For each transformer that was trained the marker of its checkpoint.
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
            "## Recipe",
            "",
            "```yaml",
            recipe.dump().rstrip(),
            "```",
            "",
        ]
    )


def _row(name: str, marker: Mapping[str, Any] | None) -> str:
    if marker is None:
        return f"| `{name}` | not trained, the base model's | | | |"
    step, samples, clips = marker["step"], marker["samples"], marker["clips"]
    return f"| `{name}` | {step} | {samples} | {clips['train']} | {clips['heldout']} |"


def _loading(recipe: Recipe, pipeline: str) -> list[str]:
    clip = recipe.clip
    image = ["    image=load_image('first.png'),"] if recipe.model.task == "i2v" else []
    utilities = "export_to_video, load_image" if image else "export_to_video"
    return [
        "```python",
        "import torch",
        f"from diffusers import {pipeline}",
        f"from diffusers.utils import {utilities}",
        "",
        f"pipe = {pipeline}.from_pretrained('path/to/this/folder', dtype=torch.bfloat16)",
        "video = pipe.to('cuda')(",
        *image,
        "    prompt='...',",
        f"    num_frames={clip.num_frames}, height={clip.height}, width={clip.width},",
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
