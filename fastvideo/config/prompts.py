# SPDX-License-Identifier: Apache-2.0
"""Prompts to sample: upstream's `validation.json` or a plain list."""

import json
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from fastvideo.config.spec import Spec
from fastvideo.errors import UserError


class Prompt(Spec):
    """An entry of the JSON files of prompts; what is empty comes from the recipe."""

    caption: str
    """The prompt."""
    image_path: str | None = None
    """First image, for image-to-video; relative to the JSON file."""
    video_path: str | None = None
    """Video whose first frame is the first image, where there is no `image_path`."""
    num_inference_steps: PositiveInt | None = None
    """Denoising steps."""
    height: PositiveInt | None = None
    """Pixels."""
    width: PositiveInt | None = None
    """Pixels."""
    num_frames: PositiveInt | None = None
    """Pixel frames."""

    @property
    def first_image(self) -> Path | None:
        """The file that gives the first image, as it was found when the prompts were loaded."""
        name = self.image_path or self.video_path
        return Path(name) if name else None


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read ``{"data": [{"caption": ...}, ...]}`` or ``["a prompt", ...]``.

    ``image_path`` and ``video_path`` come back as paths that exist.

    Raises:
        UserError: The file, the entry and what is wrong with it.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; write the prompts there, a JSON list, or "
            "change generate.prompts and validation.prompts"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply; write a list of prompts") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    entries = tree.get("data") if isinstance(tree, dict) else tree
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: write {{"data": [{{"caption": "..."}}]}} or a list of prompts')
    return tuple(
        _prompt(entry, folder=path.parent, origin=f"{path}: data[{i}]")
        for i, entry in enumerate(entries)
    )


def _prompt(entry: Any, *, folder: Path, origin: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"caption": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{origin}: is {entry!r}; write a prompt or a table with a caption")
    prompt = Prompt.parse(entry, origin=origin)
    paths = {
        key: _found(value, folder=folder, origin=f"{origin}.{key}")
        for key in ("image_path", "video_path")
        if (value := getattr(prompt, key))
    }
    return prompt.model_copy(update=paths)


def _found(name: str, *, folder: Path, origin: str) -> str:
    if "://" in name:
        raise UserError(f"{origin}: {name} is an address; fetch the file and write its path")
    path = folder / Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{origin}: {path} is not there; paths are relative to the JSON file")
    return str(path)
