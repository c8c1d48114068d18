# SPDX-License-Identifier: Apache-2.0
"""What the verbs of ``fastvideo lora`` read and write, named as their options are; no torch."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config.architectures import architecture
from fastvideo.errors import UserError
from fastvideo.models.detect import detect
from fastvideo.models.folder import find_model


@dataclass(frozen=True)
class ModelFolder:
    """A model that an option names."""

    path: Path
    family: str
    tasks: tuple[str, ...]

    @property
    def transformers(self) -> tuple[str, ...]:
        """Folders of its transformers."""
        return architecture(self.family).transformers


def model_folder(text: str, *, option: str) -> ModelFolder:
    """Find a model, a folder or the id of one on the Hub, and what it is."""
    with naming(option):
        path = find_model(text)
        found = detect(path)
    return ModelFolder(path, found.family, found.tasks)


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Let messages on a model folder name the option instead of a recipe's key."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("model.path=", f"{option} ")) from error
