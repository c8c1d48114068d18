# SPDX-License-Identifier: Apache-2.0
"""Checks a run before torch is loaded, then trains: in this process, or as the parent of several.

Free of torch until there is something to train, so that a finished run answers at once.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any

from fastvideo import atomic, state
from fastvideo.config.recipe import Recipe
from fastvideo.cost import layout
from fastvideo.errors import Stopped, UserError, measuring
from fastvideo.log import logger
from fastvideo.models.folder import find_model, read_config
from fastvideo.state import RunDir, ShardStore, TrainDir
from fastvideo.train import attempts, begun, inputs
from fastvideo.train.installed import check_optimizer, check_trackers
from fastvideo.train.node import parent
from fastvideo.train.node.brief import LaunchDir
from fastvideo.train.node.lifeline import LAST_BREATH_S
from fastvideo.train.node.nodes import Nodes, read_nodes
from fastvideo.train.node.outcome import tell_early
from fastvideo.train.node.pulse import Watched
from fastvideo.train.process import Process
from fastvideo.train.stop import StopRequest, stopped


def train(recipe: Recipe, *, force: bool = False) -> dict[str, Any]:
    """Train until ``train.steps``, each transformer from its newest complete checkpoint.

    Args:
        recipe: What to train.
        force: Go on even if keys or data that decide the result changed since the run began.

    Returns:
        ``{"trained": {transformer: {"step": last, "ran": whether anything was left to do}}}``.

    Raises:
        Stopped: A stop was asked for; the state is saved.
        UserError: The run cannot start or go on as asked, with the reason.
        Failed: The machine, not the input, ended it.
    """
    nodes = read_nodes(os.environ)
    store = ShardStore(recipe.shards.path)
    directories = {name: RunDir(recipe.run_dir).training(name) for name in recipe.transformers}
    with (
        measuring(functools.partial(_saved, directories.values())),
        StopRequest(RunDir(recipe.run_dir)) as stop,
        _telling_others(directories.values(), nodes),
        contextlib.ExitStack() as locks,
    ):
        # A finished run stays finished when its shards are gone.
        done = all(_finished(directory, recipe) for directory in directories.values())
        plan = None if done and store.read_plan() is None else state.complete_plan(store)
        # Everything is checked before the first transformer trains, and before anything is written.
        about = inputs.facts(recipe, store, plan) if plan else {name: {} for name in directories}
        if not force:
            begun.check_family(recipe)
        start = _Start(nodes, stop, force)
        if start.leads:
            locks.callback(stop.leave)
        held = {}
        for name, directory in directories.items():
            held[name] = locks.enter_context(_alone(directory)) if start.leads else None
            if not force:
                begun.check_begun(recipe, directory, about[name])
            if not _finished(directory, recipe):
                _check_machine(recipe, name, nodes)
                inputs.check_samples(recipe, store, plan)
        return {
            "trained": {
                name: _train(recipe, name, plan=plan, about=about[name], start=start, lock=lock)
                for name, lock in held.items()
            }
        }


def _saved(directories: Iterable[TrainDir]) -> int:
    """Steps of the newest complete checkpoints."""
    return sum(max(directory.complete_checkpoints(), default=0) for directory in directories)


@dataclass(frozen=True)
class _Start:
    """How training was asked for."""

    nodes: Nodes
    stop: StopRequest
    force: bool

    @property
    def leads(self) -> bool:
        """Whether this node writes what is written once; the others only read."""
        return self.nodes.rank == 0


@contextlib.contextmanager
def _telling_others(directories: Iterable[TrainDir], nodes: Nodes) -> Iterator[None]:
    """Let the other nodes know why this one ends where its processes cannot."""
    launches = [LaunchDir(directory.launches / nodes.launch_id) for directory in directories]
    # One that began before with the same id is not ours.
    ours = [launch for launch in launches if not launch.brief(nodes.rank).exists()]
    try:
        yield
    except (Exception, Stopped) as error:
        if nodes.count > 1:
            for launch in ours:
                tell_early(launch, nodes.rank, error)
        raise


def _alone(directory: TrainDir) -> AbstractContextManager[IO[str]]:
    """Hold the training's lock; what a killed start left on its way out is waited for."""
    return atomic.alone(directory.lock, busy=_busy(directory), wait_s=LAST_BREATH_S)


def _busy(directory: TrainDir) -> str:
    return (
        f"{directory.root}: another process trains here; wait for it or stop it, or choose another "
        "run_dir"
    )


def _check_machine(recipe: Recipe, transformer: str, nodes: Nodes) -> None:
    """What is asked for must be installed here, and divide among the processes."""
    offload = recipe.parallel.cpu_offload
    check_optimizer(recipe.train.optimizer, device=recipe.train.device, offload=offload)
    check_trackers(recipe.train)
    path = find_model(recipe.model.path)
    inputs.check_targets(recipe, path)
    config = read_config(path, f"{transformer}/config.json")
    processes = _processes(recipe) * nodes.count
    if found := layout.problems(recipe, config, processes=processes):
        raise UserError("\n".join(found))


def _train(
    recipe: Recipe,
    transformer: str,
    *,
    plan: dict[str, Any] | None,
    about: dict[str, Any],
    start: _Start,
    lock: IO[str] | None,
) -> dict[str, Any]:
    directory = RunDir(recipe.run_dir).training(transformer)
    if start.leads:
        keep = recipe.train.checkpoint
        state.prune_checkpoints(directory, keep_last=keep.keep_last, keep_every=keep.keep_every)
    if _finished(directory, recipe):
        logger.info("already trained: %s", directory.newest_checkpoint())
        return {"step": directory.complete_checkpoints()[-1], "ran": False}
    assert plan is not None
    if reason := start.stop.reason():
        start.stop.honour()
        raise stopped(directory, reason, steps=recipe.train.steps)
    if recipe.train.schedule.warmup_steps >= recipe.train.steps:
        logger.warning("train.schedule.warmup_steps reaches past train.steps: no peak")
    work = parent.Work(recipe, directory, about, _processes(recipe), start.nodes)
    if start.leads:
        atomic.write_bytes(directory.recipe, recipe.dump().encode(), point="recipe")
    with _counted(directory, start):
        if work.is_for_one:
            _train_alone(recipe, transformer, plan=plan, about=about, stop=start.stop)
        else:
            if lock is not None:
                atomic.share(lock, busy=_busy(directory))
            finished = functools.partial(_finished, directory, recipe)
            parent.train(work, stop=start.stop, finished=finished)
    return {"step": recipe.train.steps, "ran": True}


def _processes(recipe: Recipe) -> int:
    """How many processes train on this node."""
    asked = recipe.parallel.processes
    if recipe.train.device == "cpu":
        return asked or 1
    import torch

    visible = torch.cuda.device_count()
    if asked is not None and 0 < visible < asked:
        raise UserError(
            f"parallel.processes={asked}: each needs a GPU of its own and this node shows "
            f"{visible}; set it to {visible}, or leave it out"
        )
    return asked or max(1, visible)


@contextlib.contextmanager
def _counted(directory: TrainDir, start: _Start) -> Iterator[None]:
    """Count this start, unless a person ends it or the input has to change before the next."""
    if not start.leads:
        yield
        return
    attempts.count(directory, force=start.force)
    try:
        yield
    except (UserError, KeyboardInterrupt):
        attempts.forget(directory)
        raise
    except Stopped as stop:
        if stop.by_person:
            attempts.forget(directory)
        raise


def _train_alone(
    recipe: Recipe,
    transformer: str,
    *,
    plan: dict[str, Any],
    about: dict[str, Any],
    stop: StopRequest,
) -> None:
    """Train in this process."""
    from fastvideo.train import worker

    with Watched(hang_minutes=recipe.train.watch.hang_minutes) as pulse:
        process = Process(stop=stop, pulse=pulse)
        worker.train(recipe, transformer=transformer, plan=plan, about=about, process=process)
    gc.collect()  # libraries hold the model in a cycle; the next expert needs its memory


def _finished(directory: TrainDir, recipe: Recipe) -> bool:
    """Whether the last step is done, its held-out loss measured and its videos sampled."""
    newest = directory.newest_checkpoint()
    if newest is None:
        return False
    marker = state.read_checkpoint_marker(newest)
    assert marker is not None
    done = bool(marker["step"] >= recipe.train.steps and marker["measured"])
    sampled = directory.sampled_marker(marker["step"]).is_file()
    return done and (sampled or recipe.train.samples is None)
