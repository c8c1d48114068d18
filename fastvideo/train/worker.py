# SPDX-License-Identifier: Apache-2.0
"""One training process: builds model, data and optimizer, resumes, and runs the loop."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo import checkpoint, state
from fastvideo.config.recipe import Recipe
from fastvideo.data.loader import Samples
from fastvideo.data.shard import read_empty_prompt
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.models.family import (
    Batch,
    Family,
    Interval,
    LatentStatistics,
    find_family,
    pick_device,
)
from fastvideo.models.flow import loss_per_sample
from fastvideo.models.folder import find_model
from fastvideo.state import RunDir, ShardStore
from fastvideo.train import loop
from fastvideo.train.draw import Draw
from fastvideo.train.method import build_method, build_optimizer
from fastvideo.train.stop import StopRequest


def train(
    recipe: Recipe,
    *,
    transformer: str,
    plan: Mapping[str, Any],
    about: Mapping[str, Any],
    stop: StopRequest,
) -> None:
    """Train one transformer of the model from its newest complete checkpoint.

    Args:
        recipe: Checked against ``plan``.
        transformer: Folder of the transformer in the model.
        plan: The plan of complete shards.
        about: ``shift`` and ``interval`` of the noise levels, and what else each checkpoint is to
            say of itself.
        stop: Watched between steps.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        UserError: Something about the input, said with the fix.
    """
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    device = pick_device(recipe.train.device)
    path = find_model(recipe.model.path)
    family = find_family(recipe)
    draw, heldout = _draws(recipe, plan, columns=family.columns(path), about=about)
    if len(draw.samples) == 0:
        raise UserError(f"{recipe.shards.path}: holds no clips to train on, only held-out ones")

    model = family.load_transformer(path, folder=transformer)
    assert isinstance(model, nn.Module)
    build_method(recipe.train.method).prepare(model)
    model.to(device).train()
    optimizer = build_optimizer(model, recipe.train.optimizer)
    directory = RunDir(recipe.run_dir).training(transformer)
    progress = _resume(directory, checkpoint.Saved(model, optimizer))
    logger.info(
        "%s: %.2f M parameters on %s, %d clips, %d held out, from step %d to %d",
        transformer,
        sum(p.numel() for p in model.parameters()) / 1e6,
        device,
        len(draw.samples),
        len(heldout.samples),
        progress.step,
        recipe.train.steps,
    )
    job = loop.Job(
        train=recipe.train,
        directory=directory,
        model=model,
        optimizer=optimizer,
        losses=_losses(recipe, family),
        draw=draw,
        heldout=heldout,
        device=device,
        stop=stop,
        about=dict(about),
    )
    loop.run(job, start=progress)


def _losses(recipe: Recipe, family: Family) -> loop.Losses:
    checkpointing = recipe.train.activation_checkpointing == "full"

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        prediction_BCTYX = family.forward(
            model,
            family.arguments(batch),
            activation_checkpointing=checkpointing and torch.is_grad_enabled(),
        )
        return loss_per_sample(
            prediction_BCTYX, batch.latents, batch.noise, clean_frames=family.clean_frames
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


def _resume(directory: state.TrainDir, saved: checkpoint.Saved) -> loop.Progressed:
    """Load the newest complete checkpoint and say how far the run has come."""
    steps = directory.complete_checkpoints()
    if not steps:
        return loop.Progressed(step=0, losses=(), measured=False)
    folder = directory.checkpoint(steps[-1])
    marker = state.read_checkpoint_marker(folder)
    assert marker is not None
    checkpoint.load(folder, saved)
    logger.info("continuing from %s", folder)
    return loop.Progressed(steps[-1], tuple(marker["losses"]), marker["measured"])
