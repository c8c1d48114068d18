# SPDX-License-Identifier: Apache-2.0
"""Checks a run before torch is loaded, then trains: in this process, or as the parent of several.

Free of torch until there is something to train, so that a finished run answers at once.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastvideo import atomic, hashing, state
from fastvideo.config.recipe import Recipe
from fastvideo.cost import layout
from fastvideo.data.prompts import check_encoded
from fastvideo.errors import Stopped, UserError
from fastvideo.log import logger
from fastvideo.models.family import find_family
from fastvideo.models.folder import content_hash, files_of, find_model, read_config
from fastvideo.state import RunDir, ShardStore, TrainDir
from fastvideo.train import attempts
from fastvideo.train.installed import check_optimizer, check_trackers
from fastvideo.train.node import parent
from fastvideo.train.node.brief import LaunchDir
from fastvideo.train.node.lifeline import LAST_BREATH_S
from fastvideo.train.node.nodes import Nodes, read_nodes
from fastvideo.train.node.outcome import tell_early
from fastvideo.train.node.pulse import Watched
from fastvideo.train.process import Process
from fastvideo.train.stop import StopRequest, stopped
from fastvideo.trained import NAMES, model_facts, newest_of

MAY_CHANGE = (
    "run_dir",
    "source",
    "shards.path",
    "shards.rows",
    "model.path",
    "preprocess",
    "train.expert",
    "validation",
    "export",
    "generate",
    "parallel.processes",
    "parallel.replicate",
    "parallel.shard",
    "parallel.sequence",
    "parallel.cpu_offload",
    "train.steps",
    "train.micro_batch_size",
    "train.device",
    "train.activation_checkpointing",
    "train.compile",
    "train.checkpoint",
    "train.heldout",
    "train.samples",
    "train.watch",
    "train.log_every_steps",
    "train.tensorboard",
    "train.wandb",
    "train.profile",
    "train.loader_workers",
)
"""What a resumed run may say differently: lengths, cadences, layout, places, other verbs. What
`source` and `model.path` stand for is compared by content: clips, architecture, shift."""


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
        StopRequest(RunDir(recipe.run_dir)) as stop,
        _telling_others(directories.values(), nodes),
        contextlib.ExitStack() as locks,
    ):
        # A finished run stays finished when its shards are gone.
        done = all(_finished(directory, recipe) for directory in directories.values())
        plan = None if done and store.read_plan() is None else state.complete_plan(store)
        # Everything is checked before the first transformer trains, and before anything is written.
        about = _about(recipe, store, plan) if plan else {name: {} for name in directories}
        if not force:
            _check_family(recipe)
        start = _Start(nodes, stop, force)
        if start.leads:
            locks.callback(stop.leave)
        held = {}
        for name, directory in directories.items():
            held[name] = locks.enter_context(_alone(directory)) if start.leads else None
            if not force:
                _check_begun(recipe, directory, about[name])
            if not _finished(directory, recipe):
                _check_machine(recipe, name, nodes)
                _check_samples(recipe, store, plan)
        return {
            "trained": {
                name: _train(recipe, name, plan=plan, about=about[name], start=start, lock=lock)
                for name, lock in held.items()
            }
        }


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
    except Exception as error:
        if nodes.count > 1:
            for launch in ours:
                tell_early(launch, nodes.rank, error)
        raise


def _check_family(recipe: Recipe) -> None:
    """Transformers of one run are exported together: they must be of one model."""
    for folder in sorted(RunDir(recipe.run_dir).root.glob("train/*/")):
        newest = TrainDir(folder).newest_checkpoint()
        marker = state.read_checkpoint_marker(newest) if newest else None
        family = marker["about"].get("family") if marker else None
        if family not in (None, recipe.model.family):
            raise UserError(
                f"{folder}: was trained from a {family} model, the recipe says "
                f"{recipe.model.family}; choose another run_dir"
            )


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
    config = read_config(find_model(recipe.model.path), f"{transformer}/config.json")
    processes = _processes(recipe) * nodes.count
    if found := layout.problems(recipe, config, processes=processes):
        raise UserError("\n".join(found))


def _check_begun(recipe: Recipe, directory: TrainDir, about: dict[str, Any]) -> None:
    if begun := directory.newest_checkpoint():
        _check_recipe(recipe, directory)
        _check_same(begun, about)


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
    except Stopped:
        if start.stop.by_person():
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


def _about(recipe: Recipe, store: ShardStore, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What decides the result beside the recipe, by transformer; kept in each checkpoint."""
    path = find_model(recipe.model.path)
    family = find_family(recipe)
    family.check(path)
    _check_shards(recipe, store, plan["settings"], columns=family.columns(path))
    _check_encoders(path, store, plan["settings"])
    shared = {
        "clips": state.data_fingerprint(store, plan),
        "shift": recipe.train.timesteps.shift or family.flow_shift(path),
    }
    return {
        name: {**model_facts(recipe, path, transformer=name), **shared}
        for name in recipe.transformers
    }


def _check_recipe(recipe: Recipe, directory: TrainDir) -> None:
    if not directory.recipe.is_file():
        return
    before = dict(_flat(Recipe.load(directory.recipe).model_dump(mode="json")))
    after = dict(_flat(recipe.model_dump(mode="json")))
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{directory.recipe}: this run was started with other values: {'; '.join(changed)}. "
            "Put them back, choose another run_dir, or go on all the same with --force"
        )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), tree


def _check_shards(
    recipe: Recipe, store: ShardStore, settings: dict[str, Any], *, columns: Sequence[str]
) -> None:
    """The shards must be what this recipe would make, as far as their settings tell."""
    wanted = {
        "family": recipe.model.family,
        "clip": recipe.clip.model_dump(mode="json"),
        "dtype": recipe.shards.dtype,
        "vae_dtype": recipe.shards.vae_dtype,
        "text_dtype": recipe.shards.text_dtype,
    }
    for key, value in wanted.items():
        if settings[key] != value:
            raise UserError(
                f"{store.root}: was encoded with {key} {settings[key]!r}, the recipe says "
                f"{value!r}; run preprocess, or use the recipe the shards were made with"
            )
    made, said = settings["decode"].get("latents"), getattr(recipe.source, "latents", None)
    if made != said:
        raise UserError(
            f"{store.root}: was made with source.latents {made!r}, the recipe says {said!r}; run "
            "preprocess, or use the recipe the shards were made with"
        )
    missing = [name for name in columns if name not in settings["columns"]]
    if missing:
        raise UserError(
            f"{store.root}: holds no {' and no '.join(missing)}, which {recipe.model.path} is "
            f"conditioned on as {recipe.model.task}; run preprocess with this recipe, or use the "
            "model the shards were made for"
        )


def _check_samples(recipe: Recipe, store: ShardStore, plan: dict[str, Any] | None) -> None:
    """Prompts must be encoded, the VAE at hand, and the other expert one of this model."""
    if recipe.train.samples is None:
        return
    assert plan is not None
    check_encoded(recipe, store, plan["settings"])
    base = find_model(recipe.model.path)
    files_of(base, "vae", "scheduler")
    for transformer in recipe.architecture.transformers:
        newest_of(recipe, base, transformer=transformer)


PARTS = {"vae": "VAE", "text": "text encoder", "image": "image encoder"}


def _check_encoders(path: Path, store: ShardStore, settings: dict[str, Any]) -> None:
    """Where the model's encoders are at hand, they must be those the shards were encoded with.

    Of the VAE every file counts; of the others, which may be tens of GB, the configs.
    """
    hashes = hashing.HashCache(store.hashes)
    for part, files in settings["encoders"].items():
        for name, sha256 in files.items():
            file = path / name
            looked_at = file.is_file() and (part == "vae" or file.suffix == ".json")
            if looked_at and content_hash(file, hashes) != sha256:
                raise UserError(
                    f"{store.root}: was encoded with another {PARTS[part]} than {file}; "
                    "run preprocess, or use the model.path the shards were made with"
                )


def _check_same(begun: Path, about: dict[str, Any]) -> None:
    """The newest checkpoint must come from the same clips, architecture and shift."""
    marker = state.read_checkpoint_marker(begun)
    assert marker is not None
    names = {
        **NAMES,
        "clips": "the shards hold other clips, or other ones are held out",
        "shift": "the base model's flow_shift is another",
    }
    for key, value in about.items():
        if marker["about"].get(key) != value:
            raise UserError(
                f"{begun}: was trained when this was different: {names[key]}. Choose another "
                "run_dir for a new run, or go on from here with --force (and more train.steps)"
            )
