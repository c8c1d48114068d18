# SPDX-License-Identifier: Apache-2.0
"""The command line of ``fastvideo lora``, which takes no recipe; no torch."""

import argparse
import math
from pathlib import Path
from typing import Any

from fastvideo.config.architectures import releases

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """Its verbs are in ``verb``: ``lora extract``, ``lora merge``, ``lora convert``."""
    made = argparse.ArgumentParser(
        prog="fastvideo lora", description="Work with LoRA files; see docs/lora.md."
    )
    verbs = made.add_subparsers(metavar="VERB", required=True)
    _add_extract(verbs)
    _add_merge(verbs)
    _add_convert(verbs)
    return made


def dispatch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what was parsed; the result as plain values."""
    if arguments.verb == "lora extract":
        return _extract(arguments)
    if arguments.verb == "lora merge":
        return _merge(arguments)
    assert arguments.verb == "lora convert"
    return _convert(arguments)


def _add_extract(verbs: Any) -> None:
    verb = _verb(verbs, "extract", "make LoRA files of what a finetune changed, by singular values")
    verb.add_argument("--base", required=True, metavar="MODEL", help="what the finetune began with")
    verb.add_argument("--tuned", required=True, metavar="MODEL", help="folder of the finetune")
    size = verb.add_mutually_exclusive_group()
    size.add_argument("--rank", type=_rank, default=32, help="of each projection (32)")
    size.add_argument(
        "--energy",
        type=_share,
        metavar="SHARE",
        help="the least rank that keeps so much of the squared change of each, e.g. 0.95",
    )
    verb.add_argument(
        "--biases", action="store_true", help="keep changes of the projections' biases too"
    )
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def _add_merge(verbs: Any) -> None:
    verb = _verb(verbs, "merge", "put LoRAs into a model's weights: a folder for diffusers")
    verb.add_argument("--base", required=True, metavar="MODEL", help="folder, or id on the Hub")
    verb.add_argument(
        "--lora",
        required=True,
        action="append",
        metavar="[TRANSFORMER=]PATH[:SCALE]",
        help="a file, or a folder with pytorch_lora_weights*.safetensors; may be given repeatedly",
    )
    verb.add_argument("--dtype", choices=DTYPES, help="of the merged weights; as stored if not set")
    verb.add_argument(
        "--copy", action="store_true", help="copy the untouched weights instead of linking them"
    )
    verb.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def _add_convert(verbs: Any) -> None:
    verb = _verb(verbs, "convert", "bring a LoRA file to the names of diffusers or ComfyUI")
    verb.add_argument("--to", required=True, choices=("diffusers", "comfyui"))
    verb.add_argument(
        "--family",
        choices=sorted({release.family for release in releases()}),
        help="of the model, where names and shapes do not tell it",
    )
    verb.add_argument("source", type=Path, metavar="IN", help="file, format detected")
    verb.add_argument("out", type=Path, metavar="OUT", help="file to write")


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    made.set_defaults(verb=f"lora {name}")
    made.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return made


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")
    return share


def _extract(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastvideo.lora.extract import Extraction, extract

    how = Extraction(
        rank=None if arguments.energy else arguments.rank,
        energy=arguments.energy,
        biases=arguments.biases,
        device=arguments.device,
    )
    return extract(arguments.base, arguments.tuned, arguments.out, how=how)


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastvideo.lora.merge import merge

    return merge(
        arguments.base,
        arguments.lora,
        arguments.out,
        dtype=arguments.dtype,
        link=not arguments.copy,
    )


def _convert(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastvideo.lora.convert import convert

    return convert(arguments.source, arguments.out, to=arguments.to, family=arguments.family)
