# SPDX-License-Identifier: Apache-2.0
"""The command line: ``fastvideo VERB RECIPE [key.path=value ...]``; a verb is imported when run."""

import argparse
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastvideo import log
from fastvideo.arguments import JOBS, parse_every, parse_shards, parser, refuse_foreign_options
from fastvideo.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_UNEXPECTED,
    EXIT_USER_ERROR,
    STOP_SIGNALS,
    Failed,
    Stopped,
    UserError,
    measuring,
)
from fastvideo.launch.word import End, Task

if TYPE_CHECKING:
    from fastvideo.config.recipe import Recipe


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = _parse(argv)
    log.setup()
    end = _ended(arguments)
    if end.message:
        print(f"fastvideo {arguments.verb}: {end.message}", file=sys.stderr)
    return end.code


def _ended(arguments: argparse.Namespace) -> End:
    """Run a verb; as a process of a job it leaves word of its end."""
    try:
        task = Task.take(os.environ)
    except UserError as error:
        return End(EXIT_USER_ERROR, str(error))
    action = functools.partial(_caught, arguments)
    return task.run(arguments.verb, action) if task else action()


def _caught(arguments: argparse.Namespace) -> End:
    """How a verb ends, whichever way it does; what nobody expected is raised."""
    try:
        _listen(arguments)
        return _dispatch(arguments)
    except UserError as error:
        return End(EXIT_USER_ERROR, str(error))
    except Failed as failure:
        return End(EXIT_UNEXPECTED, str(failure))
    except Stopped as stop:
        progress, requeue = stop.progress, not stop.by_person
        return End(EXIT_STOPPED, str(stop), progress=progress, requeue=requeue)
    except (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
        return End(
            EXIT_USER_ERROR,
            f"{error.filename}: {error.strerror}; check the paths of the recipe",
        )
    except KeyboardInterrupt:
        return End(EXIT_INTERRUPTED, "interrupted")
    except BrokenPipeError:  # the reader of our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return End(EXIT_DONE)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastvideo"):
            raise
        return End(
            EXIT_UNEXPECTED,
            f"needs {error.name}, which is not installed here; pip install 'fastvideo-hpc[train]'",
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    if argv[:1] == ["lora"]:
        from fastvideo.lora import arguments as of_lora

        return of_lora.parser().parse_args(argv[1:])
    if argv[:1] == ["check"]:
        from fastvideo import check

        return check.parser().parse_args(argv)
    if not argv:
        return parser().parse_args(["--help"])
    return parser().parse_intermixed_args(argv)


def _listen(arguments: argparse.Namespace) -> None:
    """End on TERM, USR2 and Ctrl-C with the code for a stop: what is complete on disk stays.

    The verbs of ``lora`` have nothing that stays until they are done. ``run`` listens in its own
    way, and so does training once it has begun. Who waits for a job saves nothing by leaving it.
    """
    verb = arguments.verb
    waits = getattr(arguments, "cluster", None) is not None
    if waits or verb in ("run", "status", "cancel", "plan", "check"):
        return

    outcome = "what is complete stays, the same command continues"
    if verb.startswith("lora"):
        outcome = "a LoRA verb writes all or nothing, the same command begins anew"

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name}; {outcome}", by_person=number == signal.SIGINT)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def _dispatch(arguments: argparse.Namespace) -> End:
    if arguments.verb.startswith("lora"):
        return _lora(arguments)
    if arguments.verb == "check":
        return _check(arguments)
    refuse_foreign_options(arguments)
    if arguments.cluster is not None and arguments.verb in JOBS:
        return _launch(arguments)
    if arguments.verb == "run":
        return _run(arguments)
    recipe = _load(arguments)
    actions: dict[str, Callable[[Recipe, argparse.Namespace], Any]] = {
        "preprocess": _preprocess,
        "train": _train,
        "export": _export,
        "generate": _generate,
        "status": _status,
        "cancel": _cancel,
        "plan": _plan,
        "tiny": _tiny,
    }
    result = actions[arguments.verb](recipe, arguments)
    if arguments.json and result is not None:
        print(json.dumps(result))
    has_problems = arguments.verb == "plan" and result["problems"]
    return End(EXIT_USER_ERROR if has_problems else EXIT_DONE, result=result)


def _lora(arguments: argparse.Namespace) -> End:
    if arguments.verb == "lora":
        raise UserError("has options of its own, which come after it: fastvideo lora --help")
    from fastvideo.lora.arguments import dispatch

    result = dispatch(arguments)
    if arguments.json:
        print(json.dumps(result))
    return End(EXIT_DONE, result=result)


def _check(arguments: argparse.Namespace) -> End:
    from fastvideo.check import check, describe, ensure

    found = check(arguments.require)
    print(json.dumps(found) if arguments.json else describe(found))
    ensure(found)
    return End(EXIT_DONE, result=found)


def _load(arguments: argparse.Namespace) -> "Recipe":
    from fastvideo.config.recipe import Recipe

    overrides = list(arguments.overrides)
    if arguments.dtype:
        overrides.append(f"{arguments.verb}.dtype={arguments.dtype}")
    if arguments.ema:
        overrides.append("export.ema=true")
    return Recipe.load(arguments.recipe, overrides)


def _run(arguments: argparse.Namespace) -> End:
    from fastvideo import pipeline, status

    recipe = _load(arguments)
    _check_ahead(recipe, "run")
    with measuring(lambda: status.progress(recipe)):
        code = pipeline.run(recipe, force=arguments.force)
    result = status.summary(recipe)
    if arguments.json:
        print(json.dumps(result))
    return End(code, "" if code == EXIT_DONE else "a verb did not end well, see above", result)


def _launch(arguments: argparse.Namespace) -> End:
    """Submit the verb instead of running it."""
    from fastvideo import jobs

    recipe = _load(arguments)
    _chosen_shards(arguments)
    if arguments.verb in ("run", "train", "generate"):
        _check_ahead(recipe, arguments.verb)
    return jobs.launch(recipe, arguments)


def _check_ahead(recipe: "Recipe", verb: str) -> None:
    """Wrong prompts and targets must not come up after days of work."""
    from fastvideo.generate import requests
    from fastvideo.train.inputs import check_targets

    if verb in ("run", "generate"):
        requests(recipe)
    if verb in ("run", "train") and (base := Path(recipe.model.path).expanduser()).is_dir():
        check_targets(recipe, base)


def _preprocess(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo.preprocess import preprocess

    return preprocess(recipe, **_chosen_shards(arguments))


def _chosen_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """What preprocess is to do of all, or an error."""
    given = {"--shards": arguments.shards, "--every": arguments.every}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UserError("--every chooses shards as --shards does; leave out one of them")
    if chosen and arguments.manifest_only:
        raise UserError(f"--manifest-only plans all shards; leave out {chosen[0]}")
    return {
        "shards": None if arguments.shards is None else parse_shards(arguments.shards),
        "every": None if arguments.every is None else parse_every(arguments.every),
        "manifest_only": arguments.manifest_only,
    }


def _train(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo.train.launcher import train

    return train(recipe, force=arguments.force)


def _export(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo.export import export

    return export(recipe)


def _generate(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo.generate import generate

    return generate(recipe)


def _status(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo import status

    if arguments.clips and arguments.watch:
        raise UserError("--watch shows counts, not clips; leave out one of --watch and --clips")
    if arguments.clips:
        for line in status.clip_lines(recipe, as_json=arguments.json):
            print(line)
        return None
    if arguments.watch:
        status.watch(recipe, as_json=arguments.json)
        return None
    counts, text = status.report(recipe)
    if not arguments.json:
        print(text)
    return counts


def _cancel(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo import jobs

    return jobs.cancel(recipe, name=arguments.job)


def _plan(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo.config.cluster import Cluster
    from fastvideo.plan import plan
    from fastvideo.plan.text import describe

    planned = plan(recipe, Cluster.load(arguments.cluster) if arguments.cluster else None)
    if not arguments.json:
        print(describe(planned))
    return planned


def _tiny(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    folder = Path(recipe.model.path)
    if (folder / "model_index.json").is_file():
        from fastvideo.models.family import find_family

        find_family(recipe).check(folder)
        log.logger.info("already there: %s", folder)
    elif folder.exists():
        raise UserError(
            f"model.path={folder}: exists and is not a model; remove it or name another"
        )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.path) and "tiny" not in recipe.model.path:
        raise UserError(
            f"model.path={folder}: reads like the id of a model on the Hub, which a toy must not "
            "stand in for; use a recipe whose model.path says tiny, or ./ before the path"
        )
    else:
        from fastvideo.models.tiny import write_tiny

        write_tiny(folder, family=recipe.model.family, task=recipe.model.task)
        log.logger.info("wrote %s", folder)
    return {"path": str(folder)}
