# SPDX-License-Identifier: Apache-2.0
"""Verbs and options of the command line, without what they do."""

import argparse
import re
from pathlib import Path

from fastvideo import __version__
from fastvideo.errors import UserError

VERBS = {
    "preprocess": "encode raw videos and captions into Parquet shards",
    "train": "finetune on the shards; continues from the newest checkpoint",
    "export": "turn the newest checkpoints into a model folder, or LoRA files, for diffusers",
    "generate": "sample videos from the export, a checkpoint or the base model",
    "run": "preprocess, train, export and generate, skipping what is complete",
    "status": "show what is done and what is missing, and how far jobs are",
    "cancel": "end the jobs of the run that are under way; what is complete stays",
    "plan": "tell memory, work, time and disk of training before it starts, and what cannot work",
    "check": "say what is installed here and which kernels work, without a recipe",
    "lora": "extract, merge or convert LoRA files, without a recipe: fastvideo lora --help",
    "tiny": "write a tiny model of the recipe's architecture to model.path",
}

JOBS = ("preprocess", "train", "export", "generate", "run")
"""Verbs that can be submitted."""
MAX_SHARD = 999_999

EPILOG = """exit codes: 0 done, 1 unexpected error, 2 mistake in the input, 75 stopped on request \
with the state saved (run the same command again). Options of a recipe: docs/config.md"""


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs that take a recipe."""
    verbs = "\n".join(f"  {name:<11} {text}" for name, text in VERBS.items())
    made = argparse.ArgumentParser(
        prog="fastvideo",
        description=f"Finetune video diffusion models on your own clips.\n\nverbs:\n{verbs}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=__version__)
    made.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do, see above")
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, see configs/recipes")
    made.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change one value of the recipe"
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    made.add_argument(
        "--manifest-only", action="store_true", help="preprocess: plan the shards, encode nothing"
    )
    made.add_argument("--shards", metavar="0-3,7", help="preprocess: fill only these shards")
    made.add_argument(
        "--every", metavar="I/T", help="preprocess: fill only shards I, I+T, I+2T, ..."
    )
    made.add_argument(
        "--clips", action="store_true", help="status: a line per clip; JSON lines with --json"
    )
    made.add_argument(
        "--cluster",
        type=Path,
        metavar="YAML",
        help="submit preprocess, train, export, generate or run as a job, see configs/clusters; "
        "plan: where it will run",
    )
    made.add_argument(
        "--dry-run", action="store_true", help="with --cluster: print what would be submitted"
    )
    made.add_argument("--wait", action="store_true", help="with --cluster: until the job is over")
    made.add_argument("--watch", action="store_true", help="status: again and again, to the end")
    made.add_argument("--job", metavar="NAME", help="cancel: this one of several jobs")
    made.add_argument(
        "--force", action="store_true", help="train, run: go on although recipe or data changed"
    )
    made.add_argument(
        "--dtype", help="train, export, generate: the same as VERB.dtype=..., e.g. bfloat16"
    )
    made.add_argument(
        "--ema", action="store_true", help="export: as export.ema=true, the average or an error"
    )
    return made


def refuse_foreign_options(arguments: argparse.Namespace) -> None:
    """Refuse options that another verb takes, or that only a job has, rather than ignore them."""
    owners = {
        "manifest_only": ("preprocess",),
        "shards": ("preprocess",),
        "every": ("preprocess",),
        "clips": ("status",),
        "cluster": ("plan", *JOBS),
        "dry_run": JOBS,
        "wait": JOBS,
        "watch": ("status",),
        "job": ("cancel",),
        "force": ("train", "run"),
        "dtype": ("export", "generate", "train"),
        "ema": ("export",),
    }
    for name, verbs in owners.items():
        if getattr(arguments, name) not in (None, False) and arguments.verb not in verbs:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} belongs to {', '.join(verbs)}; leave it out")
    for option in ("dry_run", "wait"):
        if getattr(arguments, option) and arguments.cluster is None:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} is for jobs; name the cluster's file with --cluster")


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
