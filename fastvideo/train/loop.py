# SPDX-License-Identifier: Apache-2.0
"""The one training loop: steps, held-out loss, records, checkpoints and stops."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo import checkpoint, state
from fastvideo.checkpoint import Saved
from fastvideo.config.train import Train
from fastvideo.data.loader import Order, read_ahead
from fastvideo.errors import Stopped, UserError
from fastvideo.log import Progress, logger
from fastvideo.models.flow import loss_per_sample, noised
from fastvideo.state import TrainDir
from fastvideo.train.draw import Batch, Draw, Drawn, collate
from fastvideo.train.metrics import Metrics, peak_memory_gib
from fastvideo.train.schedule import learning_rate_factor
from fastvideo.train.stop import StopRequest

Predict = Callable[[nn.Module, Batch, Tensor], Tensor]
"""(model, batch, noised latents (B, C, T, Y, X)) to the predicted flow of the same shape."""


@dataclass(frozen=True)
class Job:
    """Everything the loop works with."""

    train: Train
    directory: TrainDir
    model: nn.Module
    optimizer: torch.optim.Optimizer
    predict: Predict
    draw: Draw
    heldout: Draw
    device: str
    stop: StopRequest
    about: dict[str, Any]
    """Goes into the marker of each checkpoint."""


@dataclass
class Window:
    """What is averaged between two records."""

    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    wait_s: float = 0.0
    start_s: float = field(default_factory=time.perf_counter)


def run(job: Job, *, start_step: int, losses: list[float]) -> None:
    """Train from ``start_step`` to the last step.

    ``losses`` are those since the last record before ``start_step``.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        UserError: The loss or the gradient is not finite.
    """
    train = job.train
    places = iter(_places(job, start_step))
    ahead = 2 * train.global_batch_size
    drawn = read_ahead(job.draw.training, places, threads=train.loader_workers, ahead=ahead)
    window = Window(losses=list(losses))
    with (
        closing(Metrics(job.directory, start_step=start_step)) as metrics,
        closing(Progress("steps", total=train.steps, done=start_step)) as progress,
        closing(drawn),
    ):
        if start_step == 0:
            _measure_heldout(job, 0, metrics)
        _check_stop(job, start_step, window, saved=start_step > 0)
        for step in range(start_step + 1, train.steps + 1):
            _one_step(job, step, drawn, window)
            progress.advance(_describe(job, window))
            if step % train.log_every_steps == 0 or step == train.steps:
                _record(job, step, metrics, window)
                window = Window()
            if _due(job, step):
                _measure_heldout(job, step, metrics)
            due = step % train.checkpoint.every_steps == 0 or step == train.steps
            if due:
                _save(job, step, window)
            if step < train.steps:
                _check_stop(job, step, window, saved=due)


def _places(job: Job, start_step: int) -> Iterator[Any]:
    order = Order(len(job.draw.samples), seed=job.train.seed)
    batch = job.train.global_batch_size
    return (order[p] for p in range(start_step * batch, job.train.steps * batch))


def _one_step(job: Job, step: int, drawn: Iterator[Drawn], window: Window) -> None:
    train = job.train
    factor = learning_rate_factor(step - 1, train.schedule, steps=train.steps)
    for group in job.optimizer.param_groups:
        group["lr"] = train.optimizer.lr * factor
    micro = train.micro_batch_size or train.global_batch_size
    total = torch.zeros((), device=job.device)
    for _ in range(train.global_batch_size // micro):
        waiting_s = time.perf_counter()
        batch = collate(list(itertools.islice(drawn, micro)), device=job.device)
        window.wait_s += time.perf_counter() - waiting_s
        loss = _losses(job, batch).sum() / train.global_batch_size
        loss.backward()
        total += loss.detach()
    trained = (p for p in job.model.parameters() if p.requires_grad)
    norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
    window.grad_norm = float(norm)
    window.losses.append(float(total))
    if not math.isfinite(window.grad_norm) or not math.isfinite(window.losses[-1]):
        raise UserError(
            f"step {step}: loss {window.losses[-1]}, gradient norm {window.grad_norm}: not finite; "
            "the last checkpoint is intact. Lower train.optimizer.lr or use train.dtype=float32"
        )
    job.optimizer.step()
    job.optimizer.zero_grad()


def _losses(job: Job, batch: Batch) -> Tensor:
    """Loss of each sample (B,)."""
    noised_BCTYX = noised(batch.latents, batch.noise, batch.sigma)
    with _autocast(job):
        prediction = job.predict(job.model, batch, noised_BCTYX)
    return loss_per_sample(prediction, batch.latents, batch.noise)


def _autocast(job: Job) -> AbstractContextManager[None]:
    if job.train.dtype == "float32":
        return nullcontext()
    return torch.autocast(job.device, dtype=getattr(torch, job.train.dtype))


def _describe(job: Job, window: Window) -> str:
    seconds = time.perf_counter() - window.start_s
    steps = len(window.losses)
    return (
        f"loss {window.losses[-1]:.4f} grad {window.grad_norm:.3f} "
        f"{steps * job.train.global_batch_size / max(seconds, 1e-9):.1f} samples/s "
        f"wait {100 * window.wait_s / max(seconds, 1e-9):.0f} % "
        f"{peak_memory_gib(job.device):.2f} GiB"
    )


def _record(job: Job, step: int, metrics: Metrics, window: Window) -> None:
    train = job.train
    seconds = time.perf_counter() - window.start_s
    samples = step * train.global_batch_size
    metrics.write(
        step,
        {
            "samples": samples,
            "epoch": samples / len(job.draw.samples),
            "loss": sum(window.losses) / len(window.losses),
            "grad_norm": window.grad_norm,
            "lr": job.optimizer.param_groups[0]["lr"],
            "samples_per_s": len(window.losses) * train.global_batch_size / seconds,
            "data_wait_share": window.wait_s / seconds,
            "memory_gib": peak_memory_gib(job.device),
        },
    )


def _due(job: Job, step: int) -> bool:
    every = job.train.heldout.every_steps
    return every is not None and (step % every == 0 or step == job.train.steps)


@torch.no_grad()
def _measure_heldout(job: Job, step: int, metrics: Metrics) -> None:
    """Mean loss over held-out clips at fixed quantiles of the noise levels, with fixed noise."""
    spec = job.train.heldout
    clips = min(len(job.heldout.samples), spec.max_clips)
    if spec.every_steps is None or clips == 0:
        return
    job.model.eval()
    quantiles = [(i + 0.5) / spec.num_timesteps for i in range(spec.num_timesteps)]
    by_quantile = [
        sum(
            float(_losses(job, collate([job.heldout.heldout(i, quantile=q)], device=job.device)))
            for i in range(clips)
        )
        / clips
        for q in quantiles
    ]
    job.model.train()
    mean = sum(by_quantile) / len(by_quantile)
    metrics.write(step, {"heldout_loss": mean, "heldout_loss_by_quantile": by_quantile})
    logger.info("step %d: held-out loss %.4f over %d clips", step, mean, clips)


def _save(job: Job, step: int, window: Window) -> None:
    about = {**job.about, "losses": window.losses}
    saved = Saved(job.model, job.optimizer)
    folder = checkpoint.save(job.directory, saved, step=step, about=about)
    state.prune_checkpoints(job.directory, keep_last=job.train.checkpoint.keep_last)
    logger.info("saved %s", folder)


def _check_stop(job: Job, step: int, window: Window, *, saved: bool) -> None:
    reason = job.stop.reason()
    if reason is None:
        return
    if not saved:
        _save(job, step, window)
    job.stop.honour()
    raise Stopped(
        f"stopped by {reason} after step {step} of {job.train.steps}; the same command continues"
    )
