# SPDX-License-Identifier: Apache-2.0
"""The `train` table of a recipe."""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fastvideo.config.spec import Spec

Share = Annotated[float, Field(ge=0, le=1)]


class Full(Spec):
    """Update every weight of the transformer."""

    kind: Literal["full"] = "full"
    """What trains."""


def _patterns(value: object) -> object:
    """Say of a wrong value what would be right, which a union of two types cannot."""
    if isinstance(value, str) and value not in ("attention", "blocks"):
        raise ValueError(f"{value!r} is no preset; write attention, blocks, or a list of patterns")
    if not isinstance(value, (list, tuple)):
        return value
    if not value:
        raise ValueError("is empty; name projections, or a preset")
    for pattern in value:
        if not isinstance(pattern, str):
            raise ValueError(f"{pattern!r} is no text; write a list of patterns")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return tuple(value)


Targets = Annotated[Literal["attention", "blocks"] | tuple[str, ...], BeforeValidator(_patterns)]


class Lora(Spec):
    """Train low-rank adapters of projections, the model itself frozen (Hu et al., 2021)."""

    kind: Literal["lora"] = "lora"
    """What trains."""
    rank: PositiveInt = 32
    """Inner dimension of an adapter."""
    alpha: PositiveFloat | None = None
    """An adapter's output is scaled by alpha / rank; empty is the rank: a scale of 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are set to zero, the same for all tokens of a sample."""
    targets: Targets = "blocks"
    """Projections that get an adapter: those of attention, or the feed-forward layers as well; or
    regular expressions, each of which must match whole names of modules as diffusers has them."""
    biases: bool = False
    """Adapters have a bias of their own."""
    norms: bool = False
    """The weights of the blocks' norms train too; they are saved beside the adapters."""


Method = Annotated[Full | Lora, Field(discriminator="kind")]


class Ema(Spec):
    """An exponential moving average of what trains, for validation and export."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share of the average that stays in a step."""
    warmup: bool = True
    """Early averages are short: step n keeps at most (1 + n) / (10 + n)."""


class AdamW(Spec):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    kind: Literal["adamw", "adamw_8bit", "apex_adamw"] = "adamw"
    """torch's fused kernels; torchao's with the running means in blocks of 8 bits (Dettmers et al.,
    2022), for the memory; NVIDIA apex's fused kernels, for whole weights (`parallel.shard` 1)."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the running mean and of the running square of the gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled decay per unit of learning rate; matrices only, never norms and biases."""


class Schedule(Spec):
    """The learning rate as a function of the step alone."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear growth from 0 to the peak; a run with fewer steps never reaches it."""
    min_lr_ratio: Share = 0.0
    """Where `linear` and `cosine` end, as a share of the peak."""


class Timesteps(Spec):
    """How the noise level sigma of a training sample is drawn."""

    density: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """Density of u in (0, 1) before the shift (Esser et al., 2024, section 3.1)."""
    logit_mean: float = 0.0
    """Mean of the normal under `logit_normal`."""
    logit_std: PositiveFloat = 1.0
    """Standard deviation of the normal under `logit_normal`."""
    mode_scale: float = Field(default=1.29, ge=-1, le=1.75)
    """Weight of the middle timesteps under `mode`."""
    shift: PositiveFloat | None = None
    """sigma = shift*u / (1 + (shift-1)*u); empty takes the model's own `flow_shift`."""
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Weight of a sample's loss by its sigma: 1, sigma**-2, or 2 / (pi (1 - 2 sigma + 2 sigma**2))
    (Esser et al., 2024, section 3.1); the second reaches a million near sigma 0. The recorded loss
    is the weighted one, held-out losses never are."""


class Checkpoints(Spec):
    """When the whole training state is saved."""

    every_steps: PositiveInt = 500
    """A checkpoint each so many steps, and always after the last."""
    every_minutes: PositiveFloat | None = None
    """And one whenever so much time has passed since the last."""
    keep_last: PositiveInt = 2
    """Older ones are removed after a newer one is complete."""
    keep_every: PositiveInt | None = None
    """Those of steps divisible by this stay for good."""
    asynchronous: bool = True
    """Copy the state to host memory and train on while it is written; the last one always waits."""


class Heldout(Spec):
    """Loss on clips that are not trained on, at fixed timesteps and noise."""

    every_steps: PositiveInt | None = 500
    """Measured each so many steps, before the first and after the last; empty switches it off."""
    num_timesteps: PositiveInt = 5
    """Evenly spaced quantiles of the training density."""
    max_clips: PositiveInt = 64
    """Clips used, the first ones in the order of the shards."""

    def due(self, step: int, *, steps: int) -> bool:
        """Whether the loss is due after ``step`` of ``steps``."""
        if self.every_steps is None:
            return False
        return step % self.every_steps == 0 or step == steps


class Samples(Spec):
    """Videos of `validation.prompts` while it trains; all else about them is said in `generate`."""

    every_steps: PositiveInt = 500
    """Sampled each so many steps, before the first and after the last."""
    max_prompts: PositiveInt = 4
    """Prompts used, the first ones of the file."""

    def due(self, step: int, *, steps: int) -> bool:
        """Whether videos are due after ``step`` of ``steps``."""
        return step % self.every_steps == 0 or step >= steps


class Watch(Spec):
    """Faults of a run that are told, counted, or end it."""

    max_skipped_steps: NonNegativeInt = 5
    """Steps in a row whose loss or gradient is not finite: they are left out and counted, one more
    ends the run."""
    spike_factor: PositiveFloat | None = 5.0
    """Warn of a loss this many times the median of the last hundred; empty does not look."""
    starved_share: Share = 0.5
    """Warn when the loop waits for data for more than this share of its time."""
    hang_minutes: PositiveFloat = 30.0
    """A process that does not get on for so long ends the run, with its name and its last step."""


class Wandb(Spec):
    """Weights & Biases, beside what is always written."""

    project: str
    """Project the run belongs to."""
    mode: Literal["offline", "online"] = "offline"
    """Offline writes below the run directory, for `wandb sync` where there is a network."""


class Profile(Spec):
    """A trace of torch's profiler, `train/<transformer>/profile/`."""

    first_step: PositiveInt = 5
    """The first step that is recorded; earlier ones warm up."""
    steps: PositiveInt = 2
    """How many are recorded."""


class Train(Spec):
    """Training of the transformer on the shards."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    seed: NonNegativeInt = 0
    """Of the order, the noise, the timesteps, the dropout and the choice of captions."""
    global_batch_size: PositiveInt = 8
    """Samples per optimizer step, whatever the number of processes."""
    micro_batch_size: PositiveInt | None = None
    """Samples per forward and backward; divides the batch of a process; empty takes all of it."""
    expert: Literal["high", "low"] | None = None
    """The expert of Wan2.2 A14B to train; empty trains both, `high` first. Other models have one
    transformer and leave it empty."""
    method: Method = Full()
    """What trains and what is saved."""
    ema: Ema | None = None
    """Keep an average of what trains; held-out losses and samples are then those of the average."""
    optimizer: AdamW = AdamW()
    """Which optimizer and its settings."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this total 2-norm."""
    timesteps: Timesteps = Timesteps()
    """Density of the noise levels."""
    text_dropout: Share = 0.1
    """Share of samples trained with the embedding of the empty prompt, for guidance."""
    guidance: PositiveFloat | None = None
    """Guidance scale that HunyuanVideo is told it has while it trains; empty is 1."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; weights, gradients and optimizer state stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of a block is computed again in the backward pass to save memory: nothing, all but its
    attention, or everything."""
    compile: bool = False
    """Compile each kind of block with torch.compile; the first steps take minutes."""
    deterministic: bool = False
    """Only kernels that give the same bits each time; slower on a GPU."""
    checkpoint: Checkpoints = Checkpoints()
    """When to save."""
    heldout: Heldout = Heldout()
    """When to measure the held-out loss."""
    samples: Samples | None = None
    """When to sample videos; empty makes none."""
    watch: Watch = Watch()
    """What counts as a fault while it trains."""
    log_every_steps: PositiveInt = 10
    """A line of metrics.jsonl and TensorBoard each so many steps."""
    tensorboard: bool = True
    """Write TensorBoard's event files; metrics.jsonl is written always."""
    wandb: Wandb | None = None
    """Report to Weights & Biases too; needs wandb."""
    profile: Profile | None = None
    """Record a few steps with torch's profiler."""
    loader_workers: NonNegativeInt = 2
    """Threads that read samples ahead; 0 reads in the loop."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        micro = self.micro_batch_size
        if micro is not None and self.global_batch_size % micro:
            fits = [
                n for n in range(1, self.global_batch_size + 1) if not self.global_batch_size % n
            ]
            raise ValueError(
                f"micro_batch_size={micro} does not divide global_batch_size="
                f"{self.global_batch_size}; use one of {', '.join(map(str, fits))}"
            )
        return self
