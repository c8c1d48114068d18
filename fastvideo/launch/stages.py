# SPDX-License-Identifier: Apache-2.0
"""Which parts a verb has as a job, from the files alone: what is missing, what waits for what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastvideo import state
from fastvideo.config.cluster import Cluster, Resources
from fastvideo.config.recipe import Recipe
from fastvideo.launch.folder import JobFolder
from fastvideo.launch.job import Array, JobSpec
from fastvideo.state import ShardStore, ranges

Verb = Literal["preprocess", "train", "export", "generate", "run"]
USUAL_MAX_ARRAY = 1001
"""``MaxArraySize`` of Slurm where nobody changed it: numbers of tasks stay below."""


@dataclass(frozen=True)
class Asked:
    """What is to be submitted."""

    verb: Verb
    recipe: Recipe
    cluster: Cluster
    flags: tuple[str, ...] = ()
    """Options of the verb: ``--force``, ``--manifest-only``, ``--shards 0-3``."""


@dataclass(frozen=True)
class Ground:
    """What all parts of a job share."""

    folder: JobFolder
    recipe_file: Path
    """The copy of the recipe that the job reads."""
    work_dir: Path
    program: tuple[str, ...]
    binds: tuple[Path, ...] = ()
    max_array: int = USUAL_MAX_ARRAY


def parts(asked: Asked, ground: Ground) -> list[JobSpec]:
    """The parts of a job, each after those that it waits for."""
    making = _Making(asked, ground)
    if asked.verb == "preprocess":
        return making.preprocess()
    if asked.verb == "train":
        return [making.part("train", "train", *asked.flags)]
    if asked.verb in ("export", "generate"):
        return [making.part(asked.verb, asked.verb)]
    return making.everything()


def fits(plan: dict[str, Any] | None, recipe: Recipe) -> bool:
    """Whether shards are planned as the recipe says, so far as this can be told without the model.

    A task looks again, with the model's files.
    """
    if plan is None:
        return False
    settings, shards = plan["settings"], recipe.shards
    return bool(
        settings["family"] == recipe.model.family
        and settings["clip"] == recipe.clip.model_dump(mode="json")
        and settings["dtype"] == shards.dtype
        and settings["vae_dtype"] == shards.vae_dtype
        and settings["text_dtype"] == shards.text_dtype
    )


def dealt(shards: Sequence[int], *, per_task: int, parallelism: int | None) -> Array:
    """An array over ``shards``; a task has the number of its first one."""
    groups = [shards[at : at + per_task] for at in range(0, len(shards), per_task)]
    values = {group[0]: ranges(group) for group in groups}
    return Array("--shards", values, parallelism)


def split(array: Array, *, max_array: int) -> list[Array]:
    """Arrays whose tasks have numbers that Slurm takes, below ``max_array``.

    They run beside each other and share ``parallelism``.
    """
    found: dict[int, dict[int, str]] = {}
    for number, value in array.values.items():
        found.setdefault(number // max_array, {})[number % max_array] = value
    share = array.parallelism and max(1, array.parallelism // len(found))
    return [replace(array, values=v, parallelism=share) for _, v in sorted(found.items())]


@dataclass(frozen=True)
class _Making:
    """Makes parts of what all share."""

    asked: Asked
    ground: Ground

    def part(
        self,
        name: str,
        verb: Literal["preprocess", "train", "export", "generate"],
        *options: str,
        after: Iterable[JobSpec] = (),
        array: Array | None = None,
        needs: Resources | None = None,
    ) -> JobSpec:
        ground, cluster = self.ground, self.asked.cluster
        return JobSpec(
            name=name,
            command=(verb, str(ground.recipe_file), *options),
            resources=needs or cluster.resources(verb),
            cluster=cluster,
            folder=ground.folder.part(name).root,
            work_dir=ground.work_dir,
            label=f"{name} {self.asked.recipe.run_dir.name}",
            nodes=cluster.nodes if verb == "train" else 1,
            program=ground.program,
            after=tuple(spec.name for spec in after),
            array=array,
            binds=ground.binds,
        )

    def manifest(self) -> JobSpec:
        """Plans the shards, which needs no GPU."""
        needs = self.asked.cluster.resources("export")
        return self.part("manifest", "preprocess", "--manifest-only", needs=needs)

    def preprocess(self) -> list[JobSpec]:
        recipe, flags = self.asked.recipe, self.asked.flags
        if "--manifest-only" in flags:
            return [self.manifest()]
        if flags:
            return [self.part("preprocess", "preprocess", *flags)]
        store = ShardStore(recipe.shards.path)
        plan = store.read_plan()
        fitting = plan if fits(plan, recipe) else None
        missing = state.missing_shards(store, fitting) if fitting else []
        if not missing:  # or nothing but new clips, prompts and failures to look at
            manifest = self.manifest()
            return [manifest, *self.filling(after=[manifest])]
        own = self.asked.cluster.preprocess
        array = dealt(missing, per_task=own.shards_per_task, parallelism=own.parallelism)
        arrays = split(array, max_array=self.ground.max_array)
        names = ["preprocess", *(f"preprocess-{i}" for i in range(2, len(arrays) + 1))]
        pairs = zip(names, arrays, strict=True)
        return [self.part(name, "preprocess", array=array) for name, array in pairs]

    def filling(self, *, after: Sequence[JobSpec]) -> list[JobSpec]:
        """Tasks that share shards which are not planned yet."""
        own = self.asked.cluster.preprocess
        tasks = min(own.tasks, self.ground.max_array)
        array = Array("--every", {i: f"{i}/{tasks}" for i in range(tasks)}, own.parallelism)
        return [self.part("preprocess", "preprocess", after=after, array=array)]

    def training(self, *, after: Sequence[JobSpec]) -> list[JobSpec]:
        """One part, or one for each expert, which train side by side."""
        recipe, flags = self.asked.recipe, self.asked.flags
        experts = recipe.architecture.experts
        if not experts or recipe.train.expert:
            return [self.part("train", "train", *flags, after=after)]
        return [
            self.part(f"train-{name}", "train", f"train.expert={name}", *flags, after=after)
            for name in experts
        ]

    def everything(self) -> list[JobSpec]:
        manifest = self.manifest()
        filling = self.filling(after=[manifest])
        training = self.training(after=filling)
        export = self.part("export", "export", after=training)
        generate = self.part("generate", "generate", after=[export])
        return [manifest, *filling, *training, export, generate]
