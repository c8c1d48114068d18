# SPDX-License-Identifier: Apache-2.0
"""Which LoRA file is for which transformer of a model, and whether it fits; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.errors import UserError
from fastvideo.models.folder import read_config
from fastvideo.models.lora_header import check_fits, read_header
from fastvideo.state import LORA_FILES


@dataclass(frozen=True)
class Chosen:
    """A LoRA file, what it is for, and how much of it."""

    file: Path
    transformer: str
    scale: float
    key: str
    """Of the option that names it, for messages."""


def choose(
    path: Path, *, scale: float, transformer: str | None, known: Sequence[str], key: str
) -> list[Chosen]:
    """Find the LoRA files of a file or a folder.

    Args:
        path: A file, or a folder with `state.LORA_FILES`.
        scale: For all of them.
        transformer: What a file is for, or which one of a folder's to take; needed only for files
            of another name where the model has two transformers.
        known: The transformers of the model.
        key: Of the option, for messages.

    Raises:
        UserError: There is none, or one for a transformer that the model has not, or it is not said
            for which one it is.
    """
    if transformer is not None and transformer not in known:
        raise UserError(f"{key}: {transformer} is none of this model, which has {_listed(known)}")
    if path.is_dir():
        found = {name: path / file for name, file in LORA_FILES.items() if (path / file).is_file()}
        if transformer is not None:
            found = {name: file for name, file in found.items() if name == transformer}
        if not found:
            raise UserError(
                f"{key}: {path} holds no {_listed(list(LORA_FILES.values()))}; name a file"
            )
        if foreign := found.keys() - set(known):
            raise UserError(
                f"{key}: {path} has {LORA_FILES[min(foreign)]} for a model with two transformers, "
                f"this one has {_listed(known)}; name the file that is meant"
            )
    else:
        found = {transformer or _meant(path, known, key=key): path}
    return [Chosen(file, name, scale, key) for name, file in found.items()]


def check_chosen(chosen: Sequence[Chosen], base: Path, family: str) -> None:
    """Refuse LoRAs that do not fit their transformer in the model folder ``base``.

    Raises:
        UserError: With the reason, see ``lora_header.check_fits``.
    """
    for lora in chosen:
        config = read_config(base, f"{lora.transformer}/config.json")
        name = f"{lora.key}: {lora.file} for {lora.transformer}"
        check_fits(read_header(lora.file).sizes(), config, family, name=name)


def _meant(file: Path, known: Sequence[str], *, key: str) -> str:
    if len(known) == 1:
        return known[0]
    for name in known:
        if file.name == LORA_FILES[name]:
            return name
    raise UserError(f"{key}: {file} does not say for which it is, {_listed(known)}; name it")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
