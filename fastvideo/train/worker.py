# SPDX-License-Identifier: Apache-2.0
"""One training process: builds model, data and optimizer, resumes, and runs the loop."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo import checkpoint
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.cost import flops, layout
from fastvideo.data.loader import Samples
from fastvideo.data.shard import read_empty_prompt
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.models.execution import Execution
from fastvideo.models.family import (
    Batch,
    Family,
    Interval,
    LatentStatistics,
    find_family,
    pick_device,
)
from fastvideo.models.flow import loss_per_sample
from fastvideo.models.folder import find_model, read_config
from fastvideo.models.weights import WeightFiles
from fastvideo.state import RunDir, ShardStore, TrainDir
from fastvideo.train import average, loop, parallel
from fastvideo.train.draw import Draw
from fastvideo.train.method import build_method
from fastvideo.train.node.pulse import SAVE_FACTOR, START_MINUTES
from fastvideo.train.optimizer import build_optimizer
from fastvideo.train.parallel import Runner, Team
from fastvideo.train.process import Process
from fastvideo.train.sampler import Sampler, forget_after
from fastvideo.train.throughput import Work
from fastvideo.trained_adapters import method_of


def train(
    recipe: Recipe,
    *,
    transformer: str,
    plan: Mapping[str, Any],
    about: Mapping[str, Any],
    process: Process,
) -> None:
    """Train one transformer of the model from its newest whole checkpoint.

    Args:
        recipe: Checked against ``plan``.
        transformer: Folder of the transformer in the model.
        plan: The plan of complete shards.
        about: ``shift`` and ``interval`` of the noise levels, and what else each checkpoint is to
            say of itself.
        process: This one among those that train together.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        Failed: The machine gave up: a full disk, numbers that are not finite.
        UserError: Something about the input, said with the fix.
    """
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    device = pick_device(recipe.train.device)
    path = find_model(recipe.model.path)
    config = read_config(path, f"{transformer}/config.json")

    def choose(memory_gib: float | None) -> layout.Layout:
        return layout.choose(recipe, config, processes=process.count, memory_gib=memory_gib)

    # As long as the watch waits for a save, the longest that it waits for.
    hang_s = max(recipe.train.watch.hang_minutes * SAVE_FACTOR, START_MINUTES) * 60
    joined = parallel.joined(process, recipe.parallel, device=device, hang_s=hang_s, choose=choose)
    with joined as team:
        if team.leads and process.count > 1:
            logger.info("%d processes, %s", process.count, _describe(team.layout))
        draws = _draws(recipe, plan, columns=find_family(recipe).columns(path), about=about)
        if len(draws[0].samples) == 0:
            raise UserError(f"{recipe.shards.path}: holds no clips to train on, only held-out ones")
        job, start = _job(recipe, path, transformer=transformer, team=team, draws=draws)
        work = work_of(recipe, config, team)
        loop.run(job, start=start, work=work, about=about)


def _describe(chosen: layout.Layout) -> str:
    return (
        f"{chosen.replicate} x {chosen.shard} (replicate x shard), {chosen.sequence} share a "
        f"sample: {chosen.reason}"
    )


def _job(
    recipe: Recipe, path: Path, *, transformer: str, team: Team, draws: tuple[Draw, Draw]
) -> tuple[loop.Job, loop.Progressed]:
    """Build what the loop works with; the weights come from a checkpoint or the base model."""
    saved = empty_state(recipe, path, transformer=transformer, team=team)
    directory = RunDir(recipe.run_dir).training(transformer)
    method = build_method(recipe.train)
    files = functools.cache(lambda: WeightFiles(path, folder=transformer))
    method.load_frozen(saved.model, files)
    start = _resume(directory, saved, team)
    if team.leads:
        forget_after(directory, start.step)
    if start.step == 0:
        method.begin(saved.model, files)
        checkpoint.begin_average(saved)
    runner = Runner(saved.model, team, recipe.parallel)
    sampler = _sampler(recipe, path, transformer=transformer, saved=saved, team=team)
    if team.leads:
        _tell(recipe, transformer, saved, draws, start)
    job = loop.Job(
        train=recipe.train,
        directory=directory,
        team=team,
        saved=saved,
        runner=runner,
        losses=losses_of(find_family(recipe), runner),
        draw=draws[0],
        heldout=draws[1],
        method=method,
        sampler=sampler,
    )
    return job, start


def _sampler(
    recipe: Recipe, path: Path, *, transformer: str, saved: checkpoint.Saved, team: Team
) -> Sampler | None:
    if recipe.train.samples is None:
        return None

    def load(other: str, newest: Path | None) -> nn.Module:
        made = _as_trained(recipe, newest)
        model = empty_model(made, path, transformer=other, team=team)
        files = functools.cache(lambda: WeightFiles(path, folder=other))
        method = build_method(made.train)
        method.load_frozen(model, files)
        if newest is None:
            method.begin(model, files)
        else:
            part = checkpoint.part_of(newest, average=recipe.train.ema is not None)
            checkpoint.load_weights(newest, model, part=part, group=team.control)
        return model.requires_grad_(False).eval()

    return Sampler(recipe, path, team=team, transformer=transformer, saved=saved, load=load)


def _as_trained(recipe: Recipe, newest: Path | None) -> Recipe:
    """The recipe with the adapters of a checkpoint, which another expert's may differ from."""
    if newest is None or not isinstance(recipe.train.method, Lora):
        return recipe
    train = recipe.train.model_copy(update={"method": method_of(newest)})
    return recipe.model_copy(update={"train": train})


def empty_state(recipe: Recipe, path: Path, *, transformer: str, team: Team) -> checkpoint.Saved:
    """Build model and optimizer as the layout says; the weights have memory, but no numbers yet."""
    train = recipe.train
    model = empty_model(recipe, path, transformer=transformer, team=team)
    model.train()
    averaged = average.empty_average(model) if train.ema else {}
    return checkpoint.Saved(model, build_optimizer(model, train.optimizer), averaged)


def empty_model(recipe: Recipe, path: Path, *, transformer: str, team: Team) -> nn.Module:
    """Build a transformer with our forward as the layout says, without numbers."""
    train, family = recipe.train, find_family(recipe)
    model: nn.Module = family.empty_transformer(path, folder=transformer)
    build_method(train).prepare(model)
    recompute = train.activation_checkpointing
    family.attach(model, Execution(recompute, train.compile, team.sequence))
    parallel.place(model, team, recipe.parallel, dtype=getattr(torch, train.dtype))
    return model


def _tell(
    recipe: Recipe,
    transformer: str,
    saved: checkpoint.Saved,
    draws: tuple[Draw, Draw],
    start: loop.Progressed,
) -> None:
    training, heldout = draws
    logger.info(
        "%s: %.2f M parameters, %.2f M of them train, on %s, %d clips, %d held out, from step %d "
        "to %d",
        transformer,
        sum(p.numel() for p in saved.model.parameters()) / 1e6,
        sum(p.numel() for p in saved.model.parameters() if p.requires_grad) / 1e6,
        pick_device(recipe.train.device),
        len(training.samples),
        len(heldout.samples),
        start.step,
        recipe.train.steps,
    )


def losses_of(family: Family, predict: Callable[[Mapping[str, Tensor]], Tensor]) -> loop.Losses:
    """Compare what is predicted with the flow that the samples were noised with."""

    def losses(batch: Batch) -> Tensor:
        return loss_per_sample(
            predict(family.arguments(batch)),
            batch.latents,
            batch.noise,
            clean_frames=family.clean_frames,
        )

    return losses


def _draws(
    recipe: Recipe, plan: Mapping[str, Any], *, columns: Sequence[str], about: Mapping[str, Any]
) -> tuple[Draw, Draw]:
    store = ShardStore(recipe.shards.path)
    settings = plan["settings"]
    empty_text = read_empty_prompt(store, settings=settings)
    statistics = LatentStatistics(tuple(settings["latents_mean"]), tuple(settings["latents_std"]))
    training, heldout = (
        Draw(
            samples=Samples(store, split=split, columns=columns),
            statistics=statistics,
            timesteps=recipe.train.timesteps,
            shift=about["shift"],
            interval=Interval(*about["interval"]),
            seed=recipe.train.seed,
            text_dropout=recipe.train.text_dropout,
            empty_text=empty_text,
        )
        for split in ("train", "heldout")
    )
    return training, heldout


def work_of(recipe: Recipe, config: Mapping[str, Any], team: Team) -> Work:
    """What a step computes, for the rates in the metrics."""
    needed = flops.training_flops(recipe, config)
    return Work(
        samples_per_step=recipe.train.global_batch_size,
        tokens_per_sample=flops.tokens_per_sample(recipe, config),
        flops_per_sample=needed.dense_equivalent,
        actual_flops_per_sample=needed.actual,
        processes=team.process.count,
        device_name=torch.cuda.get_device_name() if team.device == "cuda" else "cpu",
        dtype=recipe.train.dtype,
    )


def _resume(directory: TrainDir, saved: checkpoint.Saved, team: Team) -> loop.Progressed:
    """Load the newest whole checkpoint and say how far the run has come."""
    marker = checkpoint.resume(directory, saved, group=team.saving)
    if marker is None:
        return loop.Progressed(step=0, losses=(), measured=False, watch=None)
    return loop.Progressed(
        marker["step"], tuple(marker["losses"]), marker["measured"], marker["watch"]
    )
