# SPDX-License-Identifier: Apache-2.0
"""Submits a verb as a job of a cluster, or of this machine, and says what that would be."""

import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastvideo import atomic
from fastvideo.config.cluster import Cluster
from fastvideo.config.recipe import Recipe
from fastvideo.cost import layout
from fastvideo.errors import UserError
from fastvideo.launch import local, local_render, slurm
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import JobSpec
from fastvideo.launch.jobs import Job
from fastvideo.launch.record import Part, Record
from fastvideo.launch.stages import USUAL_MAX_ARRAY, Asked, Ground, Verb, parts
from fastvideo.launch.statuses import under_way
from fastvideo.models.folder import read_config
from fastvideo.state import RunDir

VERBS: tuple[Verb, ...] = ("preprocess", "train", "export", "generate", "run")
FLAGS: dict[Verb, tuple[str, ...]] = {
    "preprocess": ("--manifest-only", "--shards", "--every"),
    "train": ("--force",),
    "run": ("--force",),
}
"""Options that a verb takes as a job."""
IMAGES = (".sif", ".sqsh", ".squashfs")
"""Ends of the names of images that are files."""


def submit(
    verb: Verb,
    recipe: Recipe | Path | str,
    cluster: Cluster | Path | str,
    *,
    overrides: Iterable[str] = (),
    flags: Sequence[str] = (),
    again: Sequence[str] = (),
) -> Job:
    """Submit a verb and return at once.

    Args:
        verb: ``preprocess``, ``train``, ``export``, ``generate``, or ``run`` for all of them.
        recipe: What to do, or the path of the YAML that says it.
        cluster: Where, or the path of the YAML that says it.
        overrides: ``key.path=value`` changes to a recipe that is given as a path.
        flags: Options of the verb, e.g. ``("--force",)``.
        again: The command that submits it again, for people; empty for this call as a command.

    Returns:
        The job, with ``status()``, ``wait()``, ``logs()``, ``cancel()`` and ``result()``.

    Raises:
        UserError: Something in the recipe or the cluster cannot work, or the same is under way.
        Failed: Slurm does not answer.
    """
    order = _order(verb, recipe, cluster, overrides=overrides, flags=flags)
    asked = order.asked
    jobs = _absolute(RunDir(asked.recipe.run_dir).jobs)
    busy = f"{jobs}: another submission of this run is being made; try again when it is done"
    with atomic.alone(jobs.with_suffix(".lock"), busy=busy):
        if "--force" not in flags:
            _refuse_twice(asked)
        folder = JobFolder(jobs / _name(verb))
        specs = parts(asked, _ground(asked, folder))
        jobs.mkdir(exist_ok=True)
        folder.root.mkdir(mode=0o700)  # it holds the environment and what was said
        record = _record(asked, specs, again=again or order.again)
        record.write(folder)
    atomic.write_bytes(folder.recipe, asked.recipe.dump().encode(), point="job.recipe")
    for path in _written(asked.recipe) if asked.cluster.container.kind != "none" else ():
        path.mkdir(parents=True, exist_ok=True)  # runtimes mount what is there
    try:
        _hand_over(folder, specs, record)
    except BaseException as error:  # goes on
        refused = str(error) or type(error).__name__
        replace(Record.read(folder) or record, refused=refused).write(folder)
        raise
    return Job(folder)


def dry_run(
    verb: Verb,
    recipe: Recipe | Path | str,
    cluster: Cluster | Path | str,
    *,
    overrides: Iterable[str] = (),
    flags: Sequence[str] = (),
) -> str:
    """What ``submit`` would hand over, as text; nothing is written."""
    order = _order(verb, recipe, cluster, overrides=overrides, flags=flags)
    folder = JobFolder(_absolute(RunDir(order.asked.recipe.run_dir).jobs) / _name(verb))
    has_slurm = shutil.which("scontrol") is not None
    specs = parts(order.asked, _ground(order.asked, folder, ask=has_slurm))
    if order.asked.cluster.executor == "slurm":
        return slurm.dry_run(folder, specs)
    return local_render.dry_run(specs)


@dataclass(frozen=True)
class _Order:
    """What was asked for, checked."""

    asked: Asked
    again: tuple[str, ...]
    """The command that submits it again."""


def _order(
    verb: Verb,
    recipe: Recipe | Path | str,
    cluster: Cluster | Path | str,
    *,
    overrides: Iterable[str],
    flags: Sequence[str],
) -> _Order:
    if verb not in VERBS:
        raise UserError(f"{verb!r} is no job; use one of {', '.join(VERBS)}")
    changes = list(overrides)
    if isinstance(recipe, Recipe) and changes:
        raise UserError(f"overrides {changes}: belong to a recipe that is given as a path")
    known = FLAGS.get(verb, ())
    options = [flag.partition("=")[0] for flag in flags if flag.startswith("-")]
    if unknown := [option for option in options if option not in known]:
        takes = ", ".join(known) or "none"
        raise UserError(f"flags {unknown}: are not for {verb}; leave them out, it takes {takes}")
    what = recipe if isinstance(recipe, Recipe) else Recipe.load(Path(recipe), changes)
    where = _settled(cluster if isinstance(cluster, Cluster) else Cluster.load(Path(cluster)))
    names = ["RECIPE" if isinstance(recipe, Recipe) else str(recipe)]
    names += [*changes, "--cluster", "CLUSTER" if isinstance(cluster, Cluster) else str(cluster)]
    _check(verb, what, where)
    return _Order(Asked(verb, what, where, tuple(flags)), ("fastvideo", verb, *names, *flags))


def _settled(cluster: Cluster) -> Cluster:
    """With absolute paths: jobs start elsewhere, and other names may be those of a registry."""
    changes: dict[str, Any] = {}
    if cluster.setup is not None:
        changes["setup"] = _absolute(cluster.setup)
        if cluster.executor == "slurm" and not changes["setup"].is_file():
            raise UserError(f"setup={cluster.setup}: there is no such file; correct the path")
    image = cluster.container.image
    if image is not None and _is_file(image):
        changes["container"] = cluster.container.model_copy(
            update={"image": str(_absolute(Path(image)))}
        )
    return cluster.model_copy(update=changes)


def _is_file(image: str) -> bool:
    """Whether an image is a file rather than a name in a registry."""
    path = Path(image).expanduser()
    return image.startswith(("/", "./", "../", "~")) or path.suffix in IMAGES or path.exists()


# ---------------------------------------------------------------- checks


def _check(verb: Verb, recipe: Recipe, cluster: Cluster) -> None:
    """What cannot work, before it waits in a queue."""
    _check_folders(recipe, cluster)
    if cluster.executor == "local":
        local_render.check(cluster)
    for name in ("preprocess", "train", "export", "generate"):
        needs = cluster.resources(name)
        limit = needs.time_minutes
        if limit is not None and cluster.signal_seconds >= 60 * limit:
            raise UserError(
                f"signal_seconds={cluster.signal_seconds}: is no shorter than the limit of {name}, "
                f"time_minutes={limit}; lower the one or raise the other"
            )
        device = getattr(recipe, name).device if name != "export" else "auto"
        if device == "cuda" and not needs.gpus_per_node and verb in (name, "run"):
            raise UserError(
                f"{name}.device=cuda: the cluster gives {name} no GPUs; set gpus_per_node in the "
                f"cluster file, or {name}.device to auto"
            )
    if verb in ("train", "run"):
        _check_layout(recipe, cluster)


def _check_folders(recipe: Recipe, cluster: Cluster) -> None:
    work_dir = cluster.work_dir
    if work_dir is None:
        return
    if not work_dir.is_absolute():
        raise UserError(f"work_dir={work_dir}: is not absolute; jobs start on other machines")
    model, source = Path(recipe.model.path), Path(recipe.source.path)
    paths = {
        "run_dir": recipe.run_dir,
        "shards.path": recipe.shards.path,
        "model.path": model if model.is_dir() else None,
        "source.path": source if source.is_dir() else None,
        "validation.prompts": recipe.validation.prompts,
        "generate.prompts": recipe.generate.prompts,
    }
    relative = [k for k, path in paths.items() if path and not path.expanduser().is_absolute()]
    if relative and work_dir.resolve() != Path.cwd():
        raise UserError(
            f"work_dir={work_dir}: {' and '.join(relative)} of the recipe are relative to where "
            f"you are, {Path.cwd()}; submit from work_dir, or write them absolute"
        )


def _check_layout(recipe: Recipe, cluster: Cluster) -> None:
    """Whether the processes divide the batch and the model, if the model's folder is here."""
    gpus = cluster.resources("train").gpus_per_node
    if recipe.train.device == "cpu":
        processes = recipe.parallel.processes or 1
    elif recipe.parallel.processes is not None and gpus and recipe.parallel.processes > gpus:
        raise UserError(
            f"parallel.processes={recipe.parallel.processes}: the cluster gives each node {gpus} "
            "GPUs; lower the one or raise gpus_per_node"
        )
    else:
        processes = recipe.parallel.processes or gpus or 1
    folder = Path(recipe.model.path).expanduser()
    for transformer in recipe.transformers:
        if (folder / transformer / "config.json").is_file():
            config = read_config(folder, f"{transformer}/config.json")
            if found := layout.problems(recipe, config, processes=processes * cluster.nodes):
                raise UserError("\n".join(found))


def _refuse_twice(asked: Asked) -> None:
    """The same verbs at the same time would do work twice, or find each other's lock held."""
    for status in under_way(asked.recipe.run_dir):
        verbs = {asked.verb, status.record.verb}
        experts = asked.recipe.train.expert is not None and verbs == {"train"}
        if (len(verbs) == 1 or "run" in verbs) and not experts:
            force = ", or submit with --force" if "--force" in FLAGS.get(asked.verb, ()) else ""
            raise UserError(
                f"{status.folder.root}: {status.record.verb} of this run is under way; wait for "
                f"it (fastvideo status), or end it with fastvideo cancel{force}"
            )


# ---------------------------------------------------------------- writing


def _name(verb: str) -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{verb}-{secrets.token_hex(2)}"


def _absolute(path: Path) -> Path:
    """Without following links: on other machines they may lead elsewhere."""
    return Path(os.path.abspath(path.expanduser()))


def _ground(asked: Asked, folder: JobFolder, *, ask: bool = True) -> Ground:
    """What all parts share; Slurm is asked what it takes if it may be."""
    cluster = asked.cluster
    contained = cluster.container.kind != "none"
    work_dir = cluster.work_dir or Path.cwd()
    return Ground(
        folder=folder,
        recipe_file=folder.recipe,
        work_dir=work_dir,
        program=("fastvideo",) if contained else (sys.executable, "-P", "-m", "fastvideo"),
        binds=_binds(asked.recipe, work_dir) if contained else (),
        max_array=_max_array(cluster, ask=ask),
    )


def _max_array(cluster: Cluster, *, ask: bool) -> int:
    if cluster.executor == "local":
        return sys.maxsize
    return slurm.max_array_size() if ask else USUAL_MAX_ARRAY


def _written(recipe: Recipe) -> list[Path]:
    """Folders that verbs make."""
    return [_absolute(recipe.run_dir), _absolute(recipe.shards.path)]


def _binds(recipe: Recipe, work_dir: Path) -> tuple[Path, ...]:
    """Folders that the verbs of a recipe read and write, and what links among them lead to.

    Those below another one come with it.
    """
    files = [recipe.validation.prompts, recipe.generate.prompts]
    files += [lora.path for lora in recipe.generate.loras]
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    read = [work_dir, Path(recipe.model.path), Path(recipe.source.path), hub]
    read += [file.parent for file in files if file]
    named = [*_written(recipe), *(_absolute(path) for path in read if path.expanduser().is_dir())]
    here = dict.fromkeys(folder for path in named for folder in (path, path.resolve()))
    return tuple(
        folder
        for folder in here
        if not any(folder != other and folder.is_relative_to(other) for other in here)
    )


def _record(asked: Asked, specs: Sequence[JobSpec], *, again: Sequence[str]) -> Record:
    return Record(
        verb=asked.verb,
        command=tuple(again),
        executor=asked.cluster.executor,
        submitter=asked.cluster.submitter,
        host=socket.gethostname(),
        created=time.time(),
        parts=tuple(
            Part(
                name=spec.name,
                verb=spec.command[0],
                after=spec.after,
                tasks=tuple(sorted(spec.array.values)) if spec.array else None,
                nodes=spec.nodes,
            )
            for spec in specs
        ),
    )


def _hand_over(folder: JobFolder, specs: Sequence[JobSpec], record: Record) -> None:
    if record.executor == "local":
        count = specs[0].cluster.gpus_per_node
        gpus = local.gpu_pool(count, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        local.start(folder, parts=[local_render.local_part(spec) for spec in specs], gpus=gpus)
        return
    ids: dict[str, str] = {}

    def submitted(name: str, slurm_id: str) -> None:
        ids[name] = slurm_id
        known = [replace(part, slurm_id=ids.get(part.name)) for part in record.parts]
        replace(record, parts=tuple(known)).write(folder)

    slurm.submit(folder, specs, through=record.submitter, submitted=submitted)
