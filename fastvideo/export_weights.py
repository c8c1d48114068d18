# SPDX-License-Identifier: Apache-2.0
"""Weights, of a checkpoint or else, as files that diffusers loads, one file in memory at a time."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from fastvideo.checkpoint import Part, read_tensors
from fastvideo.models.aligned import write_tensors
from fastvideo.models.weights import INDEX, NAME

Read = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def write_weights(
    target: Path,
    *,
    like: Mapping[str, Tensor],
    checkpoint: Path,
    max_bytes: int,
    part: Part = "model",
) -> None:
    """Write the model of a checkpoint as ``save_pretrained`` writes it, file by file.

    Args:
        target: A folder, made where it is missing.
        like: Shapes and dtypes to write by name, in order; tensors of the meta device will do.
        checkpoint: A complete checkpoint, of however many processes.
        max_bytes: Size of a file; a larger tensor has a file of its own.
        part: The weights, or their average.

    Raises:
        UserError: The checkpoint lacks tensors of ``like`` or has them with other shapes.
    """
    read = partial(read_tensors, checkpoint, part=part)
    write_files(target, like=like, read=read, max_bytes=max_bytes)


def write_files(target: Path, *, like: Mapping[str, Tensor], read: Read, max_bytes: int) -> None:
    """Write a model as ``save_pretrained`` does, of which ``read`` gives the tensors of a file.

    Args:
        target: A folder, made where it is missing.
        like: Shapes and dtypes to write by name, in order; tensors of the meta device will do.
        read: Takes a part of ``like`` and returns its numbers, on the host.
        max_bytes: Size of a file; a larger tensor has a file of its own.
    """
    target.mkdir(parents=True, exist_ok=True)
    pattern = NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        dict(like), max_shard_size=max_bytes, filename_pattern=pattern
    )
    for file, names in split.filename_to_tensors.items():
        tensors = read({name: like[name] for name in names})
        write_tensors(target / file, tensors)
        del tensors  # before the next file's are made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / INDEX).write_text(text, encoding="utf-8")
