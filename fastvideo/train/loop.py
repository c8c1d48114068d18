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
from fastvideo.errors import Stopped
from fastvideo.log import Progress, logger
from fastvideo.models.family import Batch
from fastvideo.models.flow import loss_weight
from fastvideo.state import TrainDir
from fastvideo.train.draw import Draw, Drawn, collate
from fastvideo.train.metrics import Metrics, peak_memory_gib
from fastvideo.train.schedule import learning_rate_factor
from fastvideo.train.stop import StopRequest

Losses = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) to the loss of each sample, not weighted, float32 (B,)."""


@dataclass(frozen=True)
class Job:
    """Everything the loop works with."""

    train: Train
    directory: TrainDir
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Losses
    draw: Draw
    heldout: Draw
    device: str
    stop: StopRequest
    about: dict[str, Any]
    """Goes into the marker of each checkpoint."""


@dataclass(frozen=True)
class Progressed:
    """How far a run has come."""

    step: int
    """Finished optimizer steps."""
    losses: tuple[float, ...]
    """Of the steps since the last record."""
    measured: bool
    """Whether the held-out loss that is due at this step was measured."""


@dataclass
class Window:
    """What is averaged between two records."""

    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    steps: int = 0
    """Steps this process did, which the times below are for."""
    wait_s: float = 0.0
    start_s: float = field(default_factory=time.perf_counter)


def run(job: Job, *, start: Progressed) -> None:
    """Train from ``start`` to the last step.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        RuntimeError: The loss or the gradient is not finite.
    """
    train = job.train
    places = _places(job, start.step)
    ahead = 2 * train.global_batch_size
    drawn = read_ahead(job.draw.training, places, threads=train.loader_workers, ahead=ahead)
    window = Window(losses=list(start.losses))
    with (
        closing(Metrics(job.directory, start_step=start.step)) as metrics,
        closing(Progress("steps", total=train.steps, done=start.step)) as progress,
        closing(drawn),
    ):
        measured = start.measured or _measure_heldout(job, start.step, metrics)
        if start.step > 0 and measured and not start.measured:
            checkpoint.amend(job.directory.checkpoint(start.step), measured=True)
        _check_stop(job, Progressed(start.step, start.losses, measured), saved=True)
        for step in range(start.step + 1, train.steps + 1):
            _one_step(job, step, drawn, window)
            progress.advance(_describe(job, window))
            if step % train.log_every_steps == 0 or step == train.steps:
                _record(job, step, metrics, window)
                window = Window()
            measured = _measure_heldout(job, step, metrics)
            now = Progressed(step, tuple(window.losses), measured)
            due = step % train.checkpoint.every_steps == 0 or step == train.steps
            if due:
                _save(job, now)
            _check_stop(job, now, saved=due)


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
        weight_B = loss_weight(batch.sigma, train.timesteps)
        loss = (weight_B * _losses(job, batch)).sum() / train.global_batch_size
        loss.backward()
        total += loss.detach()
    trained = (p for p in job.model.parameters() if p.requires_grad)
    norm = torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
    window.grad_norm = float(norm)
    window.losses.append(float(total))
    window.steps += 1
    if not math.isfinite(window.grad_norm) or not math.isfinite(window.losses[-1]):
        raise RuntimeError(
            f"step {step}: loss {window.losses[-1]}, gradient norm {window.grad_norm}: not finite; "
            "the last checkpoint is intact. Lower train.optimizer.lr or use train.dtype=float32"
        )
    job.optimizer.step()
    job.optimizer.zero_grad()


def _losses(job: Job, batch: Batch) -> Tensor:
    with _autocast(job):
        return job.losses(job.model, batch)


def _autocast(job: Job) -> AbstractContextManager[None]:
    if job.train.dtype == "float32":
        return nullcontext()
    return torch.autocast(job.device, dtype=getattr(torch, job.train.dtype))


def _describe(job: Job, window: Window) -> str:
    seconds = time.perf_counter() - window.start_s
    return (
        f"loss {window.losses[-1]:.4f} grad {window.grad_norm:.3f} "
        f"{window.steps * job.train.global_batch_size / max(seconds, 1e-9):.1f} samples/s "
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
            "samples_per_s": window.steps * train.global_batch_size / seconds,
            "data_wait_share": window.wait_s / seconds,
            "memory_gib": peak_memory_gib(job.device),
        },
    )


@torch.no_grad()
def _measure_heldout(job: Job, step: int, metrics: Metrics) -> bool:
    """Mean loss over held-out clips at fixed quantiles of the noise levels, with fixed noise.

    Returns:
        False if a stop was asked for before it was finished.
    """
    spec = job.train.heldout
    clips = min(len(job.heldout.samples), spec.max_clips)
    due = spec.every_steps and (step % spec.every_steps == 0 or step == job.train.steps)
    if not due or clips == 0:
        return True
    job.model.eval()
    quantiles = [(i + 0.5) / spec.num_timesteps for i in range(spec.num_timesteps)]
    totals = [0.0] * len(quantiles)
    for index, (place, quantile) in itertools.product(range(clips), enumerate(quantiles)):
        if job.stop.reason() is not None:
            break
        batch = collate([job.heldout.heldout(index, quantile=quantile)], device=job.device)
        totals[place] += float(_losses(job, batch))
    job.model.train()
    if job.stop.reason() is not None:
        return False
    by_quantile = [total / clips for total in totals]
    mean = sum(by_quantile) / len(by_quantile)
    metrics.write(step, {"heldout_loss": mean, "heldout_loss_by_quantile": by_quantile})
    logger.info("step %d: held-out loss %.4f over %d clips", step, mean, clips)
    return True


def _save(job: Job, now: Progressed) -> None:
    clips = {"train": len(job.draw.samples), "heldout": len(job.heldout.samples)}
    about = {
        "about": job.about,
        "clips": clips,
        "samples": now.step * job.train.global_batch_size,
        "losses": now.losses,
        "measured": now.measured,
    }
    saved = Saved(job.model, job.optimizer)
    folder = checkpoint.save(job.directory, saved, step=now.step, about=about)
    state.prune_checkpoints(job.directory, keep_last=job.train.checkpoint.keep_last)
    logger.info("saved %s", folder)


def _check_stop(job: Job, now: Progressed, *, saved: bool) -> None:
    """Save, unless ``saved``, and end if a stop was asked for.

    After the last step there is nothing left to stop, before the first one nothing to save.
    """
    reason = job.stop.reason()
    if reason is None:
        return
    job.stop.honour()
    if now.step == job.train.steps and now.measured:
        return
    if not saved:
        _save(job, now)
    raise Stopped(
        f"stopped by {reason} after step {now.step} of {job.train.steps} of "
        f"{job.directory.root.name}; the same command continues"
    )
