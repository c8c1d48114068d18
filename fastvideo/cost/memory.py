# SPDX-License-Identifier: Apache-2.0
"""Bytes that training needs on each GPU, by part.

All parts are counted as if they were there at once. That is so where gradients wait for several
micro-batches or are DDP's buckets; elsewhere the truth is less, for gradients grow while
activations go.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from fastvideo.config.architectures import releases
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Full, Lora, Train
from fastvideo.cost.activations import Computation, Saved, saved
from fastvideo.cost.layers import Layers, Linear, Tokens, block_of
from fastvideo.cost.transformer import ONE, layers, tokens_of, trained_layers

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number; what trains is float32, with its gradients, running means and average."""
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

    ``weights`` are the masters, float32 where they train, and the copies that are computed with;
    ``average`` is ``train.ema``; ``workspace`` what comes and goes within a block, gathered weights
    among it, and what the libraries take. ``host`` is what waits there beside Python itself;
    ``staged`` the part of it that copies of asynchronous checkpoints take while they are written.
    ``sampling`` is all that is on the GPU while ``train.samples`` are made, 0 without; what comes
    and goes in decoding is left out.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    workspace: int
    host: int = 0
    staged: int = 0
    sampling: int = 0

    @property
    def total(self) -> int:
        """All parts on the GPU in a step."""
        return sum(self.parts().values())

    @property
    def peak(self) -> int:
        """What the GPU must have: for a step, or for sampling if that is more."""
        return max(self.total, self.sampling)

    def parts(self) -> dict[str, int]:
        """Each part on the GPU in a step by its name."""
        parts: dict[str, int] = asdict(self)
        del parts["host"], parts["staged"], parts["sampling"]
        return parts


@dataclass(frozen=True)
class Parameter:
    """Weights of one name, as they are dealt out: by whole rows; ``size`` bytes a number."""

    rows: int
    row: int
    is_matrix: bool
    spread: bool
    trains: bool = True
    size: int = FLOAT32

    def held(self, shard: int) -> int:
        """Numbers that the first of ``shard`` processes holds."""
        return self.row * (math.ceil(self.rows / shard) if self.spread else self.rows)


@dataclass(frozen=True)
class State:
    """Bytes that stay from step to step; all but ``weights`` only of what trains."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def saved(self) -> int:
        """What a checkpoint holds; trained weights are as large as their gradients."""
        return self.gradients + self.optimizer + self.average


def state_of(parameters: Mapping[Parameter, int], train: Train, *, shard: int) -> State:
    """Add up the first of ``shard`` processes; ``parameters`` by how many of each there are."""
    trained = {p: count for p, count in parameters.items() if p.trains}
    numbers = sum(count * p.held(shard) for p, count in trained.items())
    return State(
        weights=sum(count * p.size * p.held(shard) for p, count in parameters.items()),
        gradients=FLOAT32 * numbers,
        optimizer=sum(c * optimizer_bytes(p, train, shard=shard) for p, c in trained.items()),
        average=FLOAT32 * numbers if train.ema else 0,
    )


def memory(recipe: Recipe, config: Mapping[str, Any], *, processes: int, shard: int) -> Memory:
    """Bytes of each GPU for weights spread over ``shard`` of ``processes``.

    The numbers of the recipe are taken to divide, see `fastvideo.cost.layout.problems`.
    """
    parallel, train = recipe.parallel, recipe.train
    tokens = tokens_of(recipe, config, batch=micro_batch(recipe, processes=processes))
    found = trained_layers(recipe, config, tokens)
    spread = shard > 1 or parallel.cpu_offload
    kept = parameter_counts(recipe, config, spread=spread)
    state = state_of(kept, train, shard=shard)
    # Equal copies of the weights share the writing, see fastvideo.checkpoint.
    staged = state.saved * shard // processes if saves_beside(train) else 0
    host = staged
    if parallel.cpu_offload:
        plain = state_of({p: n for p, n in kept.items() if not p.spread}, train, shard=shard)
        host += state.total - plain.total + others(recipe) * (state.weights - plain.weights)
        state = plain
    waiting = activations(recipe, config, tokens)
    workspace = _workspace(recipe, found, tokens, spread=spread)
    sampling = 0
    if train.samples:
        buckets = state.gradients if processes > 1 and not spread else 0
        sampling = _sampling(recipe, found, state, spread=spread) + buckets + workspace
    return Memory(
        weights=state.weights + _copies(found, train, waiting, spread=spread),
        gradients=state.gradients,
        optimizer=state.optimizer,
        average=state.average,
        activations=waiting.peak,
        workspace=workspace,
        host=host,
        staged=staged,
        sampling=sampling,
    )


def others(recipe: Recipe) -> int:
    """Transformers that are there, frozen, to sample with the one that trains."""
    return len(recipe.architecture.transformers) - 1 if recipe.train.samples else 0


def vae_bytes(family: str) -> int:
    """The largest published VAE of the family in float32, as it samples."""
    return FLOAT32 * max(r.parameters["vae"] for r in releases() if r.family == family)


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
        method=train.method,
        how=Computation(
            train.dtype,
            gpu=train.device != "cpu",
            policy=train.activation_checkpointing,
            sequence=recipe.parallel.sequence,
        ),
    )


def parameter_counts(
    recipe: Recipe, config: Mapping[str, Any], *, spread: bool
) -> Mapping[Parameter, int]:
    """Every parameter and how many there are of it, for blocks repeat."""
    family, train = recipe.model.family, recipe.train
    return _counts(json.dumps(config), family, train.method, train.dtype, spread)


@lru_cache(maxsize=16)
def _counts(
    config: str, family: str, method: Full | Lora, dtype: str, spread: bool
) -> Mapping[Parameter, int]:
    found = layers(json.loads(config), family, ONE, method=method)
    return Counter(parameters_of(found, dtype=dtype, spread=spread))


def parameters_of(found: Layers, *, dtype: str, spread: bool) -> Iterator[Parameter]:
    """Every parameter, where ``dtype`` is that of the computation.

    In bfloat16 frozen matrices are held as they are computed with, and those outside of matrices
    stay whole where the others are spread.
    """
    mixed = dtype != "float32"
    for linear in found.linears:
        trains = linear.name not in found.frozen
        size = BFLOAT16 if mixed and not trains and not linear.exact else FLOAT32
        yield Parameter(linear.outputs, linear.inputs, True, spread, trains, size)
        if linear.bias:
            yield Parameter(linear.outputs, 1, False, spread, trains, size)
    for name, numbers in found.tables.items():
        is_matrix, trains = name.endswith("scale_shift_table"), name not in found.frozen
        rows, row = (1, numbers) if is_matrix else (numbers, 1)
        yield Parameter(rows, row, is_matrix, spread and not mixed, trains)


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
    """What matrices are computed with, beside the masters.

    Spread weights are gathered: those of the blocks one after the other (`_workspace`), the others
    for good. Autocast casts whole ones that train, each once, until the forward pass is over;
    blocks that are computed again have theirs cast again, one at a time.
    """
    if spread:
        return _gathered(found, train)
    if train.dtype == "float32":
        return 0
    everything = _cast(found)
    if train.activation_checkpointing == "none":
        return everything
    return max(everything - waiting.block, BFLOAT16 * max(found.trained.block_sizes()))


def _gathered(found: Layers, train: Train) -> int:
    """Spread matrices outside of the blocks, which stay gathered."""
    size = FLOAT32 if train.dtype == "float32" else BFLOAT16
    return size * sum(_numbers(li) for li in found.linears if block_of(li.name) not in found.blocks)


def _cast(found: Layers) -> int:
    """Whole matrices that train as autocast keeps them until a forward pass is over."""
    return BFLOAT16 * sum(map(_numbers, found.trained.linears))


def _sampling(recipe: Recipe, found: Layers, state: State, *, spread: bool) -> int:
    """What lies on the GPU while videos are made, beside DDP's buckets and what passes in blocks.

    A step's gradients and activations are gone. Another expert is laid out like the one that
    trains, and casts of what is frozen are not kept. The VAE is whole in every process.
    """
    train, count = recipe.train, others(recipe)
    copies = 0
    if spread:
        copies = (1 + count) * _gathered(found, train)
    elif train.dtype != "float32":
        copies = _cast(found)
    held = (1 + count) * state.weights + state.optimizer + state.average
    return held + copies + vae_bytes(recipe.model.family)


def _numbers(linear: Linear) -> int:
    return linear.inputs * linear.outputs


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
    trained = found.trained
    passing += max(map(_numbers, trained.linears)) * (FLOAT32 + size)
    if spread:
        summed = FLOAT32 if recipe.parallel.reduce_dtype == "float32" else BFLOAT16
        passing += max(found.block_sizes()) * 3 * size
        passing += max(trained.block_sizes()) * (size + summed)
    return passing + round(OVERHEAD_GIB * GIB)
