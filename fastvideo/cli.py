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

from fastvideo import __version__, log
from fastvideo.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_UNEXPECTED,
    EXIT_USER_ERROR,
    Failed,
    Stopped,
    UserError,
    measuring,
)
from fastvideo.launch.word import End, Task

if TYPE_CHECKING:
    from fastvideo.config.recipe import Recipe

VERBS = {
    "preprocess": "encode raw videos and captions into Parquet shards",
    "train": "finetune on the shards; continues from the newest checkpoint",
    "export": "turn the newest checkpoints into a model folder, or LoRA files, for diffusers",
    "generate": "sample videos from the export, a checkpoint or the base model",
    "run": "preprocess, train, export and generate, skipping what is complete",
    "status": "show what is done and what is missing",
    "plan": "tell memory, work, time and disk of training before it starts, and what cannot work",
    "check": "say what is installed here and which kernels work, without a recipe",
    "lora": "extract, merge or convert LoRA files, without a recipe: fastvideo lora --help",
    "tiny": "write a tiny model of the recipe's architecture to model.path",
}

MAX_SHARD = 999_999

EPILOG = """exit codes: 0 done, 1 unexpected error, 2 mistake in the input, 75 stopped on request \
with the state saved (run the same command again). Options of a recipe: docs/config.md"""


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
        _listen(arguments.verb)
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
        from fastvideo.lora.arguments import parser

        return parser().parse_args(argv[1:])
    if argv[:1] == ["check"]:
        from fastvideo.check import parser

        return parser().parse_args(argv)
    if not argv:
        return _parser().parse_args(["--help"])
    return _parser().parse_intermixed_args(argv)


def _listen(verb: str) -> None:
    """End on TERM, USR2 and Ctrl-C with the code for a stop: what is complete on disk stays.

    The verbs of ``lora`` have nothing that stays until they are done. ``run`` listens in its own
    way, and so does training once it has begun.
    """
    if verb in ("run", "status", "plan", "check"):
        return

    outcome = "what is complete stays, the same command continues"
    if verb.startswith("lora"):
        outcome = "a LoRA verb writes all or nothing, the same command begins anew"

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name}; {outcome}", by_person=number == signal.SIGINT)

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, stop)


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:<11} {text}" for name, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="fastvideo",
        description=f"Finetune video diffusion models on your own clips.\n\nverbs:\n{verbs}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do, see above")
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="YAML file, see configs/recipes"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change one value of the recipe"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument(
        "--manifest-only", action="store_true", help="preprocess: plan the shards, encode nothing"
    )
    parser.add_argument("--shards", metavar="0-3,7", help="preprocess: fill only these shards")
    parser.add_argument(
        "--every", metavar="I/T", help="preprocess: fill only shards I, I+T, I+2T, ..."
    )
    parser.add_argument(
        "--clips", action="store_true", help="status: a line per clip; JSON lines with --json"
    )
    parser.add_argument(
        "--cluster", type=Path, metavar="YAML", help="plan: where it runs, see configs/clusters"
    )
    parser.add_argument(
        "--force", action="store_true", help="train, run: go on although recipe or data changed"
    )
    parser.add_argument(
        "--dtype", help="train, export, generate: the same as VERB.dtype=..., e.g. bfloat16"
    )
    parser.add_argument(
        "--ema", action="store_true", help="export: as export.ema=true, the average or an error"
    )
    return parser


def _dispatch(arguments: argparse.Namespace) -> End:
    if arguments.verb.startswith("lora"):
        return _lora(arguments)
    if arguments.verb == "check":
        return _check(arguments)
    _refuse_foreign_options(arguments)
    if arguments.verb == "run":
        return _run(arguments)
    recipe = _load(arguments)
    actions: dict[str, Callable[[Recipe, argparse.Namespace], Any]] = {
        "preprocess": _preprocess,
        "train": _train,
        "export": _export,
        "generate": _generate,
        "status": _status,
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


def _refuse_foreign_options(arguments: argparse.Namespace) -> None:
    owners = {
        "manifest_only": ("preprocess",),
        "shards": ("preprocess",),
        "every": ("preprocess",),
        "clips": ("status",),
        "cluster": ("plan",),
        "force": ("train", "run"),
        "dtype": ("export", "generate", "train"),
        "ema": ("export",),
    }
    for name, verbs in owners.items():
        if getattr(arguments, name) not in (None, False) and arguments.verb not in verbs:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} belongs to {', '.join(verbs)}; leave it out")


def _run(arguments: argparse.Namespace) -> End:
    from fastvideo import pipeline, status
    from fastvideo.generate import requests
    from fastvideo.train.inputs import check_targets

    recipe = _load(arguments)
    # Wrong prompts and targets must not come up after days of work.
    requests(recipe)
    if (base := Path(recipe.model.path).expanduser()).is_dir():
        check_targets(recipe, base)
    with measuring(lambda: status.progress(recipe)):
        code = pipeline.run(recipe, force=arguments.force)
    result = status.summary(recipe)
    if arguments.json:
        print(json.dumps(result))
    return End(code, "" if code == EXIT_DONE else "a verb did not end well, see above", result)


def _preprocess(recipe: "Recipe", arguments: argparse.Namespace) -> Any:
    from fastvideo.preprocess import preprocess

    given = {"--shards": arguments.shards, "--every": arguments.every}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise UserError("--every chooses shards as --shards does; leave out one of them")
    if chosen and arguments.manifest_only:
        raise UserError(f"--manifest-only plans all shards; leave out {chosen[0]}")
    return preprocess(
        recipe,
        shards=None if arguments.shards is None else parse_shards(arguments.shards),
        every=None if arguments.every is None else parse_every(arguments.every),
        manifest_only=arguments.manifest_only,
    )


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

    if arguments.clips:
        for line in status.clip_lines(recipe, as_json=arguments.json):
            print(line)
        return None
    counts = status.summary(recipe)
    if not arguments.json:
        print(status.describe(counts))
    return counts


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


def parse_shards(text: str) -> list[int]:
    """``0-3,7`` as ``[0, 1, 2, 3, 7]``."""
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise UserError(f"--shards {text}: {part!r} is not a number or a range like 0-3")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last <= MAX_SHARD:
            raise UserError(f"--shards {text}: {part!r} runs backwards or past {MAX_SHARD}")
        indices.extend(range(first, last + 1))
    return sorted(set(indices))


def parse_every(text: str) -> tuple[int, int]:
    """``3/8`` as ``(3, 8)``."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text, re.ASCII)
    if not match:
        raise UserError(f"--every {text}: is not I/T like 3/8, of the shards 3, 11, 19, ...")
    rest, count = int(match[1]), int(match[2])
    if rest >= count:
        raise UserError(f"--every {text}: runs from 0/{count} to {max(count - 1, 0)}/{count}")
    return rest, count
