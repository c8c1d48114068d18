# SPDX-License-Identifier: Apache-2.0
"""Bytes that training needs on each GPU, by part.

All parts are counted as if they were there at once. That is so where gradients wait for several
micro-batches or are DDP's buckets; elsewhere the truth is less, for gradients grow while
activations go.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Train
from fastvideo.cost.activations import Kernels, Saved, saved
from fastvideo.cost.layers import Layers, Tokens
from fastvideo.cost.transformer import layers, tokens_of

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number; weights, gradients and running means are float32."""
OVERHEAD_GIB = 1.5
"""What is there before the first tensor, and gaps: CUDA's context with its kernels, workspaces of
cuBLAS and cuDNN, NCCL's buffers. A judgement; it differs by driver and by 1 GiB."""
QUANTIZED_BLOCK, QUANTIZED_LEAST = 256, 4096
"""8-bit states: numbers that share a float32 scale, and the least of them in a parameter."""
CODE_TABLE_BYTES = 256 * FLOAT32
"""Each 8-bit state has a table of its own of what its codes mean."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part, and of the host for its process.

    ``weights`` are the float32 masters and the copies that are computed with; ``workspace`` what
    comes and goes within a block, gathered weights among it, and what the libraries take. ``host``
    is what waits there beside Python itself; ``staged`` the part of it that copies of asynchronous
    checkpoints take while they are written.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    host: int = 0
    staged: int = 0

    @property
    def total(self) -> int:
        """All parts on the GPU."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Each part on the GPU by its name."""
        parts: dict[str, int] = asdict(self)
        del parts["host"], parts["staged"]
        return parts


@dataclass(frozen=True)
class Parameter:
    """Weights of one name, as they are dealt out: by whole rows."""

    rows: int
    row: int
    is_matrix: bool
    spread: bool

    def held(self, shard: int) -> int:
        """Numbers that the first of ``shard`` processes holds."""
        return self.row * (math.ceil(self.rows / shard) if self.spread else self.rows)


def memory(recipe: Recipe, config: Mapping[str, Any], *, processes: int, shard: int) -> Memory:
    """Bytes of each GPU for weights spread over ``shard`` of ``processes``.

    The numbers of the recipe are taken to divide, see `fastvideo.cost.layout.problems`.
    """
    parallel, train = recipe.parallel, recipe.train
    tokens = tokens_of(recipe, config, batch=micro_batch(recipe, processes=processes))
    found = layers(config, recipe.model.family, tokens)
    spread = shard > 1 or parallel.cpu_offload
    kept = Counter(parameters_of(found, train, spread=spread))  # blocks repeat
    numbers = sum(count * p.held(shard) for p, count in kept.items())
    moments = sum(count * optimizer_bytes(p, train, shard=shard) for p, count in kept.items())
    state = [FLOAT32 * numbers, FLOAT32 * numbers, moments]
    # Equal copies of the weights share the writing, see fastvideo.checkpoint.
    copies = processes // shard
    staged = (FLOAT32 * numbers + moments) // copies if saves_beside(train) else 0
    host = staged
    if parallel.cpu_offload:
        plain = FLOAT32 * sum(n * p.held(shard) for p, n in kept.items() if not p.spread)
        host += sum(state) - 4 * plain
        state = [plain, plain, 2 * plain]
    waiting = activations(recipe, config, tokens)
    return Memory(
        weights=state[0] + _copies(found, train, waiting, spread=spread),
        gradients=state[1],
        optimizer=state[2],
        activations=waiting.peak,
        workspace=_workspace(recipe, found, tokens, spread=spread),
        host=host,
        staged=staged,
    )


def saves_beside(train: Train) -> bool:
    """Whether checkpoints are copied to the host and written beside training; the last one waits.

    Each process copies all that it holds, under DDP everything.
    """
    spec = train.checkpoint
    return spec.asynchronous and (spec.every_minutes is not None or spec.every_steps < train.steps)


def micro_batch(recipe: Recipe, *, processes: int) -> int:
    """Samples of one forward and backward pass of a process."""
    groups = max(1, processes // recipe.parallel.sequence)
    return recipe.train.micro_batch_size or max(1, recipe.train.global_batch_size // groups)


def activations(recipe: Recipe, config: Mapping[str, Any], tokens: Tokens) -> Saved:
    """What waits for the backward pass of a micro-batch, as the recipe trains."""
    train = recipe.train
    return saved(
        config,
        recipe.model.family,
        tokens,
        policy=train.activation_checkpointing,
        sequence=recipe.parallel.sequence,
        kernels=Kernels(train.dtype, gpu=train.device != "cpu"),
    )


def parameters_of(found: Layers, train: Train, *, spread: bool) -> Iterator[Parameter]:
    """Every parameter; those outside of matrices stay whole where bfloat16 is gathered."""
    for linear in found.linears:
        yield Parameter(linear.outputs, linear.inputs, is_matrix=True, spread=spread)
        yield Parameter(linear.outputs, 1, is_matrix=False, spread=spread)
    for name, size in found.tables.items():
        is_matrix = name.endswith("scale_shift_table")
        rows, row = (1, size) if is_matrix else (size, 1)
        whole = train.dtype != "float32"
        yield Parameter(rows, row, is_matrix=is_matrix, spread=spread and not whole)


def optimizer_bytes(parameter: Parameter, train: Train, *, shard: int) -> int:
    """Bytes of both running means: float32, or 8 bits where rows are whole blocks.

    The least of 8 bits is of the whole parameter: how it is spread changes no kind of state.
    """
    numbers = parameter.held(shard)
    if (
        train.optimizer.kind != "adamw_8bit"
        or not parameter.is_matrix
        or parameter.row % QUANTIZED_BLOCK
        or parameter.rows * parameter.row < QUANTIZED_LEAST
    ):
        return 2 * FLOAT32 * numbers
    return 2 * (numbers + FLOAT32 * numbers // QUANTIZED_BLOCK + CODE_TABLE_BYTES)


def _copies(found: Layers, train: Train, waiting: Saved, *, spread: bool) -> int:
    """What matrices are computed with, beside the float32 masters.

    Spread weights are gathered: those of the blocks one after the other (`_workspace`), the others
    for good. Autocast casts whole ones, each once, until the forward pass is over; blocks that are
    computed again have theirs cast again, one at a time.
    """
    size = FLOAT32 if train.dtype == "float32" else BFLOAT16
    sizes = {f"{linear.name}.": linear.inputs * linear.outputs for linear in found.linears}
    prefixes = tuple(f"{block}." for block in found.blocks)
    if spread:
        return size * sum(n for name, n in sizes.items() if not name.startswith(prefixes))
    if train.dtype == "float32":
        return 0
    everything = BFLOAT16 * sum(sizes.values())
    if train.activation_checkpointing == "none":
        return everything
    return max(everything - waiting.block, BFLOAT16 * max(found.block_sizes()))


def _workspace(recipe: Recipe, found: Layers, tokens: Tokens, *, spread: bool) -> int:
    """What comes and goes in the backward pass of a block, at its largest, and `OVERHEAD_GIB`.

    Gradients of the tokens: of the residual stream, of a norm's input and of its output in
    float32, of both ends of the feed-forward layer's activation in the dtype of the computation.
    The gradient of the largest matrix before it is added to the others. Of spread weights two
    blocks are gathered, one into a buffer as well; the gradient of a block waits to be summed.
    """
    size = FLOAT32 if recipe.train.dtype == "float32" else BFLOAT16
    rows = tokens.batch * math.ceil(tokens.video / recipe.parallel.sequence)
    widest = max(found.linears, key=lambda linear: linear.outputs * linear.rows)
    narrow = min(widest.inputs, widest.outputs)
    passing = rows * (3 * FLOAT32 * narrow + 2 * size * widest.outputs)
    largest = max(linear.inputs * linear.outputs for linear in found.linears)
    passing += largest * (FLOAT32 + size)
    if spread:
        summed = FLOAT32 if recipe.parallel.reduce_dtype == "float32" else BFLOAT16
        passing += max(found.block_sizes()) * (3 * size + size + summed)
    return passing + round(OVERHEAD_GIB * GIB)
