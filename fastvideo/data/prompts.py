# SPDX-License-Identifier: Apache-2.0
"""Which prompts preprocessing encodes, and what of them sampling finds in ``validation.parquet``.

The rows are the empty prompt, which text dropout needs, then the validation prompts in their order,
and last the negative prompt where guidance takes one that is not empty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvideo import hashing
from fastvideo.config.prompts import load_prompts
from fastvideo.config.recipe import Recipe
from fastvideo.data.first_image import PromptToEncode, prompt_to_encode
from fastvideo.errors import UserError
from fastvideo.models.family import Text
from fastvideo.state import ShardStore, read_marker

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


def prompts_to_encode(recipe: Recipe) -> list[PromptToEncode]:
    """The prompts of all rows.

    Raises:
        UserError: A prompt that this model cannot make.
    """
    clip, file = recipe.clip, recipe.validation.prompts
    size = (clip.num_frames, clip.height, clip.width)
    prompts = [
        prompt_to_encode(recipe, prompt, origin=f"{file}: data[{i}]")
        for i, prompt in enumerate(load_prompts(file) if file else ())
    ]
    negative = recipe.generate.negative_prompt
    needed = [negative] if prompts and negative and recipe.guided else []
    return [
        PromptToEncode("", None, *size),
        *prompts,
        *(PromptToEncode(caption, None, *size) for caption in needed),
    ]


def prompts_fingerprint(settings: Mapping[str, Any], prompts: Sequence[PromptToEncode]) -> str:
    """What ``validation.parquet`` is made from: the shards' settings, and prompts by content."""
    identities = [
        {**prompt.values, "image": hashing.file_sha256(prompt.image) if prompt.image else None}
        for prompt in prompts
    ]
    return hashing.fingerprint({"settings": settings, "prompts": identities})


def check_encoded(recipe: Recipe, store: ShardStore, settings: Mapping[str, Any]) -> None:
    """Refuse a store that does not hold the recipe's prompts as they are now; needs no torch."""
    wanted = prompts_fingerprint(settings, prompts_to_encode(recipe))
    if read_marker(store.validation, fingerprint=wanted) is None:
        raise UserError(
            f"{store.validation}: does not hold {recipe.validation.prompts} and what else "
            "train.samples needs as the recipe has it now; run preprocess"
        )


@dataclass(frozen=True)
class Encoded:
    """A prompt as the encoders left it."""

    text: Text
    image_HWC: "npt.NDArray[np.uint8] | None"
    """The first image, RGB at the size of the video, where the prompt gives one."""
    clip_feature: "Tensor | None"
    """(257, D), where the model takes it."""


@dataclass(frozen=True)
class EncodedPrompts:
    """What ``validation.parquet`` held when it was read; it may be written anew later."""

    fingerprint: str
    negative: Text | None
    """What guidance leads away from; None without guidance."""
    prompts: tuple[Encoded, ...]


def read_encoded(recipe: Recipe, store: ShardStore, *, captions: Sequence[str]) -> EncodedPrompts:
    """Read the first prompts, whose ``captions`` are given, and the negative one.

    Raises:
        UserError: The file is missing, damaged, or holds other prompts.
    """
    negative = recipe.generate.negative_prompt if recipe.guided else ""
    marker = read_marker(store.validation)
    rows = marker["rows"] if marker else []
    chosen = [*rows[1 : 1 + len(captions)], *(rows[-1:] if negative else rows[:1])]
    if marker is None or [row["caption"] for row in chosen] != [*captions, negative]:
        raise UserError(f"{store.validation}: was encoded anew meanwhile; run preprocess")
    *prompts, away = (_encoded(store, row) for row in chosen)
    return EncodedPrompts(
        marker["fingerprint"], away.text if recipe.guided else None, tuple(prompts)
    )


def _encoded(store: ShardStore, row: Mapping[str, Any]) -> Encoded:
    from fastvideo.data.shard import read_texts, stored_tensor

    found = {
        name: stored.read()
        for name in ("pil_image", "clip_feature")
        if (stored := stored_tensor(store.validation, row, name)) is not None
    }
    pixels_CHW = found.get("pil_image")
    return Encoded(
        text=read_texts(store.validation, row)[0],
        image_HWC=None if pixels_CHW is None else pixels_CHW.byte().permute(1, 2, 0).numpy(),
        clip_feature=found.get("clip_feature"),
    )
