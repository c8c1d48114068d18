# SPDX-License-Identifier: Apache-2.0
"""How the blocks of a transformer are run: recomputed, compiled, on a part of the tokens."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastvideo.models.sequence import SequenceParallel

Recompute = Literal["none", "selective", "full"]
Block = Callable[..., Any]
"""(layer, tokens, ...) to the tokens after the layer."""

ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
"""What ``selective`` keeps where tokens attend to each other: half of a block's arithmetic or more,
for one tensor of its tokens."""


@dataclass(frozen=True)
class Execution:
    """None of it changes the result beyond rounding."""

    recompute: Recompute = "none"
    """What is computed again in the backward pass, see ``train.activation_checkpointing``."""
    compile: bool = False
    """Whether blocks go through torch.compile."""
    sequence: SequenceParallel | None = None
    """The processes that share each sample's tokens."""


def attach(layers: Iterable[nn.Module], block: Block, execution: Execution) -> None:
    """Give diffusers' layers our forward, so that calling one runs it and whatever hooks it has."""
    run = recomputed(block, execution.recompute)
    if execution.compile:
        run = torch.compile(run)
    for layer in layers:
        layer.forward = functools.partial(run, layer)


def call(layer: nn.Module, *arguments: Any) -> Any:
    """Run an attached layer."""
    return layer(*arguments)


def recomputed(block: Block, recompute: Recompute) -> Block:
    """Return ``block`` such that its backward pass computes again what was not kept."""
    if recompute == "none":
        return block
    options: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    def run(layer: nn.Module, *arguments: Any) -> Any:
        return checkpoint(block, layer, *arguments, **options)

    return run


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    if operation in ATTENTION:
        query_BHSK, key_BHNK = arguments[:2]
        if query_BHSK.shape[2] == key_BHNK.shape[2]:  # else to a text, which is cheap
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
