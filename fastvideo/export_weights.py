# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint as files that diffusers loads, one file in memory at a time."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from fastvideo.checkpoint import Part, read_tensors
from fastvideo.models.aligned import write_tensors
from fastvideo.models.weights import INDEX, NAME


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
    target.mkdir(parents=True, exist_ok=True)
    pattern = NAME.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(
        dict(like), max_shard_size=max_bytes, filename_pattern=pattern
    )
    for file, names in split.filename_to_tensors.items():
        tensors = read_tensors(checkpoint, {name: like[name] for name in names}, part=part)
        write_tensors(target / file, tensors)
        del tensors  # before the next file's are made
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (target / INDEX).write_text(text, encoding="utf-8")
