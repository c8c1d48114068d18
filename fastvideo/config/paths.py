# SPDX-License-Identifier: Apache-2.0
"""Texts and paths of a recipe that may not be empty."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; write a path")
    return value


def _home_is_known(value: str) -> str:
    try:
        Path(value).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{value!r}: there is no such user; write the path in full, or ./ before it"
        ) from None
    return value


def _path(value: object) -> object:
    if isinstance(value, str):
        _not_empty(value)
        if "\0" in value:
            raise ValueError(f"{value!r} has a NUL character in it; write a path")
        return str(Path(_home_is_known(value)).expanduser())
    return value


Text = Annotated[str, AfterValidator(_not_empty)]
Place = Annotated[Text, AfterValidator(_home_is_known)]
"""A path, or an id on the Hub."""
File = Annotated[Path, BeforeValidator(_path)]
