# SPDX-License-Identifier: Apache-2.0
"""The one training loop: steps, held-out loss, records, checkpoints and stops.

Every process runs it in step; what is written once, process 0 writes.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvideo import checkpoint
from fastvideo.checkpoint import Saved
from fastvideo.config.train import Train
from fastvideo.cost.devices import find_device
from fastvideo.data.loader import Order, Place, read_ahead
from fastvideo.errors import Stopped
from fastvideo.log import Progress, logger
from fastvideo.models.family import Batch
from fastvideo.models.flow import loss_weight
from fastvideo.state import TrainDir
from fastvideo.train import average, heldout
from fastvideo.train.draw import Draw, Drawn, collate
from fastvideo.train.method import Method
from fastvideo.train.metrics import Metrics, peak_memory_gib
from fastvideo.train.optimizer import clip_grad_norm
from fastvideo.train.parallel import Runner, Team
from fastvideo.train.profile import Profiler
from fastvideo.train.sampler import Sampler
from fastvideo.train.saver import Saver
from fastvideo.train.schedule import learning_rate_factor
from fastvideo.train.stop import is_of_person
from fastvideo.train.stopwatch import Stopwatch
from fastvideo.train.throughput import Work, rates
from fastvideo.train.watch import LossWatch

Losses = Callable[[Batch], Tensor]
"""A batch to the loss of each sample, not weighted, float32 (B,)."""


@dataclass(frozen=True)
class Job:
    """Everything the loop works with."""

    train: Train
    directory: TrainDir
    team: Team
    saved: Saved
    runner: Runner
    losses: Losses
    draw: Draw
    heldout: Draw
    method: Method
    sampler: Sampler | None = None


@dataclass(frozen=True)
class Progressed:
    """How far a run has come."""

    step: int
    """Finished optimizer steps."""
    losses: tuple[float, ...]
    """Of the steps since the last record."""
    measured: bool
    """Whether the held-out loss that is due at this step was measured."""
    watch: Mapping[str, Any] | None
    """What `LossWatch` remembers."""


@dataclass
class Window:
    """What is averaged between two records."""

    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    steps: int = 0
    """Steps this process did, which the times below are for."""
    start_s: float = field(default_factory=time.perf_counter)


def run(job: Job, *, start: Progressed, work: Work, about: Mapping[str, Any]) -> None:
    """Train from ``start`` to the last step.

    Args:
        job: What to work with.
        start: How far earlier processes came.
        work: What a step computes, for the rates.
        about: Goes into the marker of each checkpoint.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        Failed: Losses are not finite, or the state cannot be saved.
    """
    with contextlib.ExitStack() as stack:
        Loop(job, start, work, about, stack).run(start)


class Loop:
    """The state of a run in this process."""

    def __init__(
        self,
        job: Job,
        start: Progressed,
        work: Work,
        about: Mapping[str, Any],
        stack: contextlib.ExitStack,
    ) -> None:
        """Open what has to be closed on ``stack``; the others are as in `run`."""
        self._job, self._work, self._about = job, work, about
        train, team = job.train, job.team
        spec = train.watch
        self._watch = LossWatch.from_state(spec, start.watch) if start.watch else LossWatch(spec)
        self._stopwatch = Stopwatch(team.device)
        self._order = Order(
            job.draw.samples.shapes, batch_size=train.global_batch_size, seed=train.seed
        )
        drawn = read_ahead(
            job.draw.training,
            self._our_places(start.step),
            threads=train.loader_workers,
            ahead=2 * train.global_batch_size // team.layout.data,
        )
        self._drawn: Iterator[Drawn] = stack.enter_context(closing(drawn))
        self._saver = Saver(job.directory, spec=train.checkpoint, group=team.saving, copy=team.copy)
        self._metrics = self._progress = None
        if team.leads:
            metrics = Metrics(
                job.directory, start_step=start.step, train=train, measured=start.measured
            )
            self._metrics = stack.enter_context(closing(metrics))
            progress = Progress("steps", total=train.steps, done=start.step)
            self._progress = stack.enter_context(closing(progress))
        self._profiler = stack.enter_context(
            Profiler(
                train.profile,
                job.directory.root / "profile",
                rank=team.process.rank,
                start_step=start.step,
            )
        )
        self._window = Window(losses=list(start.losses))
        self._saved_s = time.monotonic()

    def run(self, start: Progressed) -> None:
        """Measure, check for stops, and step."""
        job, train = self._job, self._job.train
        measured = start.measured or self._measure_heldout(start.step)
        if start.step > 0 and measured and not start.measured and job.team.leads:
            checkpoint.amend(job.directory.checkpoint(start.step), measured=True)
        sampled = self._sample(start.step)
        self._check_stop(start.step, measured=measured, sampled=sampled, saved=True)
        for step in range(start.step + 1, train.steps + 1):
            self.one_step(step)
            self._saver.check()
            self.record(step)
            measured = self._measure_heldout(step)
            saved = self._save_if_due(step, measured=measured)
            sampled = self._sample(step)
            self._check_stop(step, measured=measured, sampled=sampled, saved=saved)
            self._profiler.step()
        self._saver.finish()

    def _our_places(self, start_step: int) -> Iterator[Place]:
        for step in range(start_step, self._job.train.steps):
            yield from self._job.team.share(self._order.batch(step))

    def _beat(self, step: int, phase: str) -> None:
        self._job.team.process.pulse.beat(step, phase)

    # ------------------------------------------------------------ a step

    def one_step(self, step: int) -> None:
        """Draw, compute, and change the weights."""
        job, train = self._job, self._job.train
        factor = learning_rate_factor(step - 1, train.schedule, steps=train.steps)
        for group in job.saved.optimizer.param_groups:
            group["lr"] = train.optimizer.lr * factor
        loss = float(job.team.total(self._gradients(step)))
        self._beat(step, "optimizer")
        with self._stopwatch.phase("optimizer"):
            parameters = [p for p in job.saved.model.parameters() if p.requires_grad]
            norm = float(clip_grad_norm(parameters, train.max_grad_norm))
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                job.saved.optimizer.step()
                if train.ema is not None:
                    average.update(job.saved, train.ema, step=step)
            job.saved.optimizer.zero_grad()
        self._tell(step, loss, norm, finite=finite)

    def _gradients(self, step: int) -> Tensor:
        """Leave the gradients of a step in the parameters; our share of its loss, ()."""
        job, train = self._job, self._job.train
        share = train.global_batch_size // job.team.layout.data
        micro = min(train.micro_batch_size or share, share)
        total = torch.zeros((), device=job.team.device)
        for first in range(0, share, micro):
            self._beat(step, "data")
            with self._stopwatch.phase("data"):
                drawn = list(itertools.islice(self._drawn, micro))
            # Copies may wait for passes before this one: not the time that data takes.
            batch = collate(drawn, device=job.team.device)
            seeds = [each.seed for each in drawn]
            job.method.draw(job.saved.model, seeds, device=job.team.device)
            with job.runner.micro_batch(last=first + micro >= share):
                self._beat(step, "forward")
                with self._stopwatch.phase("forward"):
                    weight_B = loss_weight(batch.sigma, train.timesteps)
                    loss = (weight_B * self._losses(batch)).sum() / train.global_batch_size
                self._beat(step, "backward")
                with self._stopwatch.phase("backward"):
                    loss.backward()
            total += loss.detach()
        with self._stopwatch.phase("backward"):
            job.runner.finish()
        return total

    def _losses(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self._job.losses(batch)

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = self._job.train.dtype
        if dtype == "float32":
            return nullcontext()
        return torch.autocast(self._job.team.device, dtype=getattr(torch, dtype))

    def _tell(self, step: int, loss: float, norm: float, *, finite: bool) -> None:
        """Remember a step's numbers and warn of strange ones."""
        places = self._order.batch(step - 1)
        clips = [self._job.draw.samples.id(place.index) for place in places]
        if finite:
            self._window.losses.append(loss)
            warnings = self._watch.look(step, loss, norm, clips)
        else:
            warnings = [self._watch.skipped(step, loss, norm, clips)]
        self._window.grad_norm = norm
        self._window.steps += 1
        if self._progress is not None:
            for warning in warnings:
                logger.warning("%s", warning)
            self._progress.advance(self._describe(loss))

    # ------------------------------------------------------------ records

    def _describe(self, loss: float) -> str:
        window, train = self._window, self._job.train
        seconds = max(time.perf_counter() - window.start_s, 1e-9)
        return (
            f"loss {loss:.4f} grad {window.grad_norm:.3f} "
            f"{window.steps * train.global_batch_size / seconds:.1f} samples/s "
            f"{peak_memory_gib(self._job.team.device):.2f} GiB"
        )

    def record(self, step: int) -> None:
        """Write a line of metrics where one is due."""
        train, window = self._job.train, self._window
        if step % train.log_every_steps and step != train.steps:
            return
        (memory_gib,) = self._job.team.largest(peak_memory_gib(self._job.team.device))
        phases = self._stopwatch.take()
        seconds = time.perf_counter() - window.start_s
        self._window = Window()
        if self._metrics is None:
            return
        samples = step * train.global_batch_size
        wait_share = phases.get("data", 0.0) / seconds
        if warning := self._watch.starved(wait_share):
            logger.warning("%s", warning)
        mean = sum(window.losses) / len(window.losses) if window.losses else math.nan
        device = find_device(self._work.device_name)
        self._metrics.write(
            step,
            {
                "samples": samples,
                "tokens": samples * self._work.tokens_per_sample,
                "epoch": samples / len(self._job.draw.samples),
                "loss": mean,
                "grad_norm": window.grad_norm,
                "lr": self._job.saved.optimizer.param_groups[0]["lr"],
                "skipped_steps": self._watch.skipped_steps,
                "step_s": seconds / max(window.steps, 1),
                **{f"{name}_s": spent / max(window.steps, 1) for name, spent in phases.items()},
                **rates(self._work, steps=window.steps, seconds=seconds, device=device),
                "data_wait_share": wait_share,
                "memory_gib": memory_gib,
            },
        )

    def _measure_heldout(self, step: int) -> bool:
        """Measure the held-out loss if it is due; False if a stop was asked for before the end."""
        job, spec = self._job, self._job.train.heldout
        if not spec.due(step, steps=job.train.steps) or len(job.heldout.samples) == 0:
            return True
        with self._stopwatch.phase("heldout"), average.evaluated(job.saved):
            found = heldout.measure(
                job.heldout, spec, losses=self._losses, team=job.team, step=step
            )
        if found is None:
            return False
        if self._metrics is not None:
            samples = step * job.train.global_batch_size
            self._metrics.write(
                step,
                {
                    "samples": samples,
                    "tokens": samples * self._work.tokens_per_sample,
                    "heldout_loss": found.mean,
                    "heldout_loss_by_quantile": found.by_quantile,
                },
            )
            logger.info("step %d: held-out loss %.4f over %d clips", step, found.mean, found.clips)
        return True

    def _sample(self, step: int) -> bool:
        """Sample the videos that are due; False if a stop was asked for before it was finished.

        A checkpoint that is due comes first: what is missing of the videos can be made from it.
        """
        sampler, metrics = self._job.sampler, self._metrics
        if sampler is None:
            return True
        with self._stopwatch.phase("sampling"):
            return sampler.sample(step, show=metrics.show if metrics is not None else None)

    # ------------------------------------------------------------ checkpoints and stops

    def _save_if_due(self, step: int, *, measured: bool) -> bool:
        """Save where steps or minutes say so; whether it was done."""
        spec = self._job.train.checkpoint
        last = step == self._job.train.steps
        minutes = (time.monotonic() - self._saved_s) / 60
        late = spec.every_minutes is not None and minutes >= spec.every_minutes
        (late,) = self._job.team.any(late)
        if not (last or late or step % spec.every_steps == 0):
            return False
        self._save(step, measured=measured, wait=last)
        return True

    def _save(self, step: int, *, measured: bool, wait: bool) -> None:
        job = self._job
        clips = {"train": len(job.draw.samples), "heldout": len(job.heldout.samples)}
        about = {
            "about": dict(self._about),
            "clips": clips,
            "samples": step * job.train.global_batch_size,
            "losses": tuple(self._window.losses),
            "measured": measured,
            "watch": self._watch.state(),
            "average": bool(job.saved.average),
            "processes": job.team.process.count,
        }
        self._beat(step, "save")
        with self._stopwatch.phase("save"):
            self._saver.save(job.saved, step=step, about=about, wait=wait)
        self._saved_s = time.monotonic()

    def _check_stop(self, step: int, *, measured: bool, sampled: bool, saved: bool) -> None:
        """Save, unless ``saved``, and end if a stop was asked for.

        After the last step there is nothing left to stop, before the first one nothing to save.
        """
        job, stop = self._job, self._job.team.process.stop
        reason = stop.reason()
        asked, by_person = job.team.any(reason is not None, is_of_person(reason))
        if not asked:
            return
        stop.honour()
        if step == job.train.steps and measured and sampled:
            return
        if not saved:
            self._save(step, measured=measured, wait=True)
        self._saver.finish()
        raise Stopped(
            f"stopped by {reason or 'another process'} after step {step} of {job.train.steps} of "
            f"{job.directory.root.name}; the same command continues",
            by_person=by_person,
        )
