# SPDX-License-Identifier: Apache-2.0
"""Safetensors files whose numbers begin where kernels round as they do in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo.models.weights import DTYPES

ALIGNMENT = 64
"""Where the numbers begin, in bytes. Readers map files, and kernels round by the place in memory:
so a loaded file computes bit for bit what the tensors compute that were written."""
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; its own library has no alignment but to 8 bytes.

    Args:
        file: Written in place; callers that need a complete file or none give a temporary name.
        tensors: Of the host, by name; every one begins at a multiple of its width.
        metadata: Texts for the header, beside the format's own mark.
    """
    # Wide numbers first, as the library has it: each tensor is then aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
