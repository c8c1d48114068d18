# SPDX-License-Identifier: Apache-2.0
"""One tensor of a row of upstream FastVideo's Parquet: what its columns say, and whether it is so.

Upstream writes bytes, shape and type of a tensor into columns of their own, and reads the bytes as
float32 whatever the type says.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = {
    "vae_latent": 4,
    "text_embedding": 2,
    "clip_feature": 2,
    "first_frame_latent": 4,
    "pil_image": 3,
}
"""Tensors by the stem of their columns, with their number of axes: (C, T, Y, X) raw latent,
(L, D) text, (N, D) image features, (C, T, Y, X) normalised latent of the first frame followed by
grey, and (C, H, W) first frame."""

EMPTY = {"vae_latent": "empty_latent", "text_embedding": "empty_text"}
"""Tensors that every clip has, with the reason why one without cannot be used."""

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
_BFLOAT16_EXPONENT = 0x7F80


class Damaged(Exception):
    """A tensor that cannot be used: why, in snake_case, and the value that is at fault."""

    def __init__(self, reason: str, detail: str) -> None:
        """``detail`` is for people."""
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class StoredTensor:
    """What a row says of one tensor. ``missing`` names a column that the others need."""

    stem: str
    bytes: int = 0
    shape: tuple[int | None, ...] = ()
    declared: str = ""
    missing: str = ""
    sha256: str = ""
    finite: bool = True

    def dtype(self) -> str | None:
        """Return the type its bytes are in, None if the row has no such tensor.

        Raises:
            Damaged: The columns contradict each other, or it is none to train on.
        """
        if self.missing:
            raise Damaged("missing_column", f"{self.missing} is missing")
        if self._absent():
            if self.stem in EMPTY:
                raise Damaged(
                    EMPTY[self.stem],
                    f"{self.stem} has {self.bytes} bytes, shape {list(self.shape)}",
                )
            return None
        shape = self.checked_shape()
        dtype = self._checked_dtype(math.prod(shape))
        if self.bytes != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise Damaged(
                "wrong_byte_count",
                f"{self.stem} has {self.bytes} bytes, not those of {list(shape)} in {dtype}",
            )
        if not self.finite:
            raise Damaged("not_finite", f"{self.stem} holds values that are not finite")
        return dtype

    def checked_shape(self) -> tuple[int, ...]:
        """Return the shape; ``Damaged`` if no tensor of this stem has it."""
        shape = tuple(length for length in self.shape if length is not None and length > 0)
        if len(shape) != len(self.shape):
            raise Damaged("bad_shape", f"{self.stem}_shape is {list(self.shape)}")
        if len(shape) != TENSORS[self.stem]:
            raise Damaged(
                "wrong_rank",
                f"{self.stem}_shape {list(shape)} has {len(shape)} axes, not {TENSORS[self.stem]}",
            )
        return shape

    def _absent(self) -> bool:
        """Upstream writes b"", [] and "" for what a row does not have."""
        return self.bytes == 0 and (self.stem in EMPTY or not self.shape or 0 in self.shape)

    def _checked_dtype(self, count: int) -> str:
        dtype = self.declared.removeprefix("torch.") or "float32"  # upstream reads all as float32
        image = self.stem == "pil_image"
        if dtype not in _ITEM_BYTES or (dtype == "uint8" and not image):
            raise Damaged("unknown_dtype", f"{self.stem}_dtype is {self.declared!r}")
        # Upstream's newer preprocessing keeps the image in bytes where it promises floats.
        return "uint8" if image and dtype == "float32" and self.bytes == count else dtype


def measured(
    stem: str, data: Any, *, shape: Sequence[int | None] | None, declared: str
) -> StoredTensor:
    """Look at the bytes of a tensor and let them go."""
    sha256 = hashlib.sha256(data).hexdigest()
    stored = StoredTensor(stem, len(data), tuple(shape or ()), declared, sha256=sha256)
    try:
        dtype = stored.dtype()
    except Damaged:  # it says so again when it is asked
        return stored
    return dataclasses.replace(stored, finite=dtype is None or _finite(data, dtype))


def restored(
    stem: str, data: Any, *, shape: Sequence[int | None] | None, declared: str
) -> "Tensor | None":
    """Return a tensor of its own memory in its stored type, None if the row has none.

    Raises:
        Damaged: The bytes are not those that the other columns speak of.
    """
    import torch

    described = StoredTensor(stem, len(data), tuple(shape or ()), declared)
    dtype = described.dtype()
    if dtype is None:
        return None
    stored = "int16" if dtype == "bfloat16" else dtype  # numpy has no bfloat16
    values = torch.from_numpy(np.frombuffer(data, stored).copy())
    return values.view(getattr(torch, dtype)).view(described.checked_shape())


def _finite(data: Any, dtype: str) -> bool:
    if dtype == "uint8":
        return True
    if dtype == "bfloat16":
        exponents = np.frombuffer(data, np.uint16) & _BFLOAT16_EXPONENT
        return bool((exponents != _BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(np.frombuffer(data, dtype)).all())
