# SPDX-License-Identifier: Apache-2.0
"""Jobs on the command line: submitted, waited for, cancelled."""

import argparse
import json
import shlex
from typing import Any

from fastvideo.config.cluster import Cluster
from fastvideo.config.recipe import Recipe
from fastvideo.errors import EXIT_DONE, EXIT_UNEXPECTED, EXIT_USER_ERROR, UserError
from fastvideo.launch import Job, dry_run, submit
from fastvideo.launch.states import State
from fastvideo.launch.statuses import JobStatus, reasons, under_way
from fastvideo.launch.table import describe
from fastvideo.launch.word import End
from fastvideo.log import logger


def launch(recipe: Recipe, arguments: argparse.Namespace) -> End:
    """Submit a verb, or say what that would be."""
    cluster = Cluster.load(arguments.cluster)
    flags = _flags(arguments)
    if arguments.dry_run:
        print(dry_run(arguments.verb, recipe, cluster, flags=flags), end="")
        return End(EXIT_DONE)
    job = submit(arguments.verb, recipe, cluster, flags=flags, again=_again(arguments))
    for part in job.record.parts:
        logger.info("submitted %s %s", part.name, part.slurm_id or "")
    if arguments.wait:
        return _waited(job, as_json=arguments.json)
    print(json.dumps(job.status().as_json()) if arguments.json else job.folder.root)
    return End(EXIT_DONE)


def cancel(recipe: Recipe, *, name: str | None) -> list[str]:
    """End jobs of a run that are under way, or one of them.

    Returns:
        Names of the jobs that were ended.

    Raises:
        UserError: No job of this name is under way.
    """
    found = [status.folder for status in under_way(recipe.run_dir)]
    chosen = [folder for folder in found if name in (None, folder.name)]
    if name is not None and not chosen:
        known = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"--job {name}: is not under way in {recipe.run_dir}; there are: {known}")
    for folder in chosen:
        Job(folder).cancel()
        logger.info("cancelled %s", folder.name)
    if not chosen:
        logger.info("nothing is under way in %s", recipe.run_dir)
    return [folder.name for folder in chosen]


def _flags(arguments: argparse.Namespace) -> list[str]:
    """Options of the verb that the job is to have too."""
    flags = ["--force"] if arguments.force else []
    flags += ["--manifest-only"] if arguments.manifest_only else []
    for name in ("shards", "every"):
        if (value := getattr(arguments, name)) is not None:
            flags += [f"--{name}", value]
    return flags


def _again(arguments: argparse.Namespace) -> list[str]:
    """The command that submits the same again, but for ``--force`` and the like."""
    words = ["fastvideo", arguments.verb, str(arguments.recipe), *arguments.overrides]
    words += ["--dtype", arguments.dtype] if arguments.dtype else []
    words += ["--ema"] if arguments.ema else []
    return [*words, "--cluster", str(arguments.cluster)]


def _waited(job: Job, *, as_json: bool) -> End:
    """Stay until the job is over; its end is ours."""
    last: dict[str, Any] = {}
    logger.info("Ctrl-C leaves the job alone; fastvideo cancel ends it")
    for status in job.follow():
        if (value := status.as_json()) != last:  # in which no time goes by
            last = value
            logger.info("%s", describe([status]))
    print(json.dumps(status.as_json()) if as_json else job.folder.root)
    return _end(status)


def _end(status: JobStatus) -> End:
    if status.state == State.COMPLETED:
        return End(EXIT_DONE)
    words = [word for part in status.parts.values() for word in part.words.values()]
    mistake = any(word.code == EXIT_USER_ERROR for word in words)
    again = f"to go on: {shlex.join(status.record.command)}"
    message = "\n".join([f"{status.folder.name}: {status.state}", *reasons(status), again])
    return End(EXIT_USER_ERROR if mistake else EXIT_UNEXPECTED, message)
