# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint as files that diffusers loads, one file in memory at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from fastvideo.checkpoint import read_tensors
from fastvideo.models.weights import DTYPES, INDEX, NAME

ALIGNMENT = 64
"""Where the numbers begin, in bytes. Readers map files, and kernels round by the place in memory:
so a loaded export computes bit for bit what the trained model computes."""
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write_weights(
    target: Path, *, like: Mapping[str, Tensor], checkpoint: Path, max_bytes: int
) -> None:
    """Write the model of a checkpoint as ``save_pretrained`` writes it, file by file.

    Args:
        target: A folder, made where it is missing.
        like: Shapes and dtypes to write by name, in order; tensors of the meta device will do.
        checkpoint: A complete checkpoint, of however many processes.
        max_bytes: Size of a file; a larger tensor has a file of its own.

    Raises:
        UserError: The checkpoint lacks tensors of ``like`` or has them with other shapes.
    """
    target.mkdir(parents=True, exist_ok=True)
    pattern = NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        dict(like), max_shard_size=max_bytes, filename_pattern=pattern
    )
    for file, names in split.filename_to_tensors.items():
        tensors = read_tensors(checkpoint, {name: like[name] for name in names})
        _write_file(target / file, tensors)
        del tensors  # before the next file's are made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / INDEX).write_text(text, encoding="utf-8")


def _write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; its own library has no alignment but to 8 bytes."""
    # Wide numbers first, as the library has it: each tensor is then aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
