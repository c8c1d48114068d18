# SPDX-License-Identifier: Apache-2.0
"""What a LoRA file is for, from its header alone, and whether it fits a model; no torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.config.architectures import Release, releases
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers
from fastvideo.errors import UserError
from fastvideo.models.lora_names import diffusers_names, parse, split

RANKS = "fastvideo_ranks"
"""Entry of a file's metadata: the rank of each part of the projections that are several in one."""
MAX_HEADER_BYTES = 100_000_000
"""Of the safetensors format."""


@dataclass(frozen=True)
class Size:
    """Of the adapter of one projection."""

    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Header:
    """A LoRA file without its numbers.

    ``keys`` has by module, as the file names it, the key of each kind (see ``lora_names.KINDS``).
    """

    file: Path
    keys: Mapping[str, Mapping[str, str]]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def size(self, module: str) -> Size:
        """Size of an adapter as it is in the file."""
        down, up = (self.shapes[self.keys[module][kind]] for kind in ("down", "up"))
        return Size(down[0], math.prod(down[1:]), up[0])

    def ranks(self, module: str) -> list[int] | None:
        """Ranks of the parts of a module that is several in one, where the file tells them."""
        try:
            found = json.loads(self.metadata.get(RANKS, "{}")).get(module)
        except (ValueError, AttributeError):
            return None
        if not isinstance(found, list) or len(found) != len(diffusers_names(module)):
            return None
        whole = all(type(rank) is int and rank >= 0 for rank in found)
        return found if whole and sum(found) == self.size(module).rank else None

    def sizes(self) -> dict[str, Size]:
        """Sizes of the adapters by the names of diffusers.

        Raises:
            UserError: A projection that holds several has not the shape of these, or one is there
                under two names.
        """
        found: dict[str, Size] = {}
        for module in self.keys:
            parts = self._parts(module)
            if twice := found.keys() & parts.keys():
                raise UserError(f"{self.file}: {min(twice)} is there twice, once as {module}")
            found |= parts
        return found

    def _parts(self, module: str) -> dict[str, Size]:
        names, size = diffusers_names(module), self.size(module)
        if len(names) == 1:
            return {names[0]: size}
        outputs = split(size.outputs, inputs=size.inputs, parts=len(names))
        if outputs is None:
            raise UserError(
                f"{self.file}: {module} has {size.outputs} outputs, which do not divide into "
                f"{', '.join(name.rpartition('.')[2] for name in names)}; it is damaged, or for "
                "another kind of model"
            )
        ranks = self.ranks(module) or [size.rank] * len(names)
        parts = zip(names, ranks, outputs, strict=False)
        return {name: Size(rank, size.inputs, wide) for name, rank, wide in parts if rank}


def read_header(file: Path) -> Header:
    """Read the names and shapes of a LoRA file in any tongue of ``lora_names``.

    Raises:
        UserError: It is no safetensors file, no LoRA, or incomplete.
    """
    header = _read_json(file)
    metadata = header.pop("__metadata__", {})
    try:
        shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        whole = all(type(n) is int and n >= 0 for shape in shapes.values() for n in shape)
        texts = all(isinstance(value, str) for value in metadata.values())
    except (KeyError, TypeError, AttributeError):
        whole = texts = False
    if not (whole and texts):
        raise UserError(f"{file}: its header is damaged; fetch it again")
    keys = _by_module(file, shapes)
    for module, kinds in keys.items():
        _check_module(file, module, kinds, shapes)
    return Header(file, keys, shapes, metadata)


def check_fits(
    sizes: Mapping[str, Size], config: Mapping[str, Any], family: str, *, name: str
) -> None:
    """Refuse a LoRA of another model; needs no torch.

    Args:
        sizes: Of the adapters, by the names of diffusers.
        config: The config.json of the transformer.
        family: Of the recipe.
        name: What the message begins with: the file, and what it was meant for.

    Raises:
        UserError: A projection is not in the model or has another shape, and for which released
            models it would be right.
    """
    problem = _misfit(sizes, config, family)
    if problem is None:
        return
    fitting = ", ".join(release.name for release in fitting_releases(sizes))
    known = f"it has the shapes of {fitting}" if fitting else "it fits no known release"
    raise UserError(f"{name}: does not fit the model: {problem}; {known}; give a LoRA of this one")


def fitting_releases(sizes: Mapping[str, Size]) -> list[Release]:
    """Released models that a LoRA is right for by its names and shapes."""
    return [r for r in releases() if _misfit(sizes, r.transformer, r.family) is None]


def _misfit(sizes: Mapping[str, Size], config: Mapping[str, Any], family: str) -> str | None:
    linears = {linear.name: linear for linear in layers(config, family, Tokens(1, 1)).linears}
    for name, size in sizes.items():
        if name not in linears:
            return f"there is no projection {name}"
        wanted = (linears[name].inputs, linears[name].outputs)
        if (size.inputs, size.outputs) != wanted:
            found = f"{size.inputs} to {size.outputs}"
            return f"{name} takes {wanted[0]} numbers to {wanted[1]}, the LoRA's {found}"
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= MAX_HEADER_BYTES else b""
        header = json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is cut or of another format"
        raise UserError(f"{file}: is no safetensors file ({reason}); check the path") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: its header is damaged; fetch it again")
    return header


def _by_module(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    keys: dict[str, dict[str, str]] = {}
    for key in shapes:
        found = parse(key)
        if found is None:
            raise UserError(
                f"{file}: {key} is no part of a LoRA as it is known here (matrices lora_A and "
                "lora_B or lora_down and lora_up, alpha, and biases); DoRA, LoKr and changes of "
                "whole weights are not supported"
            )
        kinds = keys.setdefault(found[0], {})
        if found[1] in kinds:
            raise UserError(f"{file}: {key} and {kinds[found[1]]} are the same; keep one")
        kinds[found[1]] = key
    if not keys:
        raise UserError(f"{file}: holds no tensors; give a LoRA file")
    return keys


def _check_module(
    file: Path, module: str, kinds: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    if kinds.keys().isdisjoint(("down", "up")) and "diff_b" in kinds:
        raise UserError(
            f"{file}: {kinds['diff_b']} changes a bias of which the weight has no matrices, which "
            "is not supported; remove it from the file if the rest is to be used"
        )
    for kind, words in (("down", "lora_A or lora_down"), ("up", "lora_B or lora_up")):
        if kind not in kinds:
            raise UserError(f"{file}: {module} has no {words}; it is incomplete, fetch it again")
    down, up = shapes[kinds["down"]], shapes[kinds["up"]]
    if min(len(down), len(up)) < 2 or down[0] != up[1] or 0 in (*down, *up):
        raise UserError(
            f"{file}: {kinds['down']} and {kinds['up']} have shapes {down} and {up}, which are no "
            "(rank, in) and (out, rank)"
        )
    for kind in ("bias", "diff_b"):
        if kind in kinds and shapes[kinds[kind]] != up[:1]:
            raise UserError(f"{file}: {kinds[kind]} has shape {shapes[kinds[kind]]}, not {up[:1]}")
    if {"bias", "diff_b"} <= kinds.keys():
        raise UserError(f"{file}: {module} has both {kinds['bias']} and {kinds['diff_b']}")
    if "alpha" in kinds and math.prod(shapes[kinds["alpha"]]) != 1:
        raise UserError(f"{file}: {kinds['alpha']} is not one number")
