# SPDX-License-Identifier: Apache-2.0
"""A model folder made from another: some parts new, the rest linked or copied, all or nothing."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from fastvideo import atomic, hashing
from fastvideo.errors import UserError

WEIGHTS = (".safetensors", ".bin")


@contextlib.contextmanager
def replacing_folder(folder: Path, *, point: str, marker: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill; then it is synced and takes the place of ``folder``.

    Args:
        folder: A complete one stays until the new one is.
        point: Names the fault points.
        marker: Vouches for the old folder and is in the new one: the old one goes first. Without
            one nothing is replaced.

    Raises:
        UserError: ``folder`` is there and has no marker, be it that it came in the meantime.
    """
    temporary = atomic.temporary_name(folder)
    atomic.sweep(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        atomic.fault(f"{point}.write")
        for path in temporary.rglob("*"):
            atomic.sync(path)
        atomic.fault(f"{point}.fsync")
        if marker is None:
            _rename(temporary, folder)
        else:
            marker.unlink(missing_ok=True)
            atomic.fault(f"{point}.unmark")
            shutil.rmtree(folder, ignore_errors=True)
            atomic.fault(f"{point}.clear")
            temporary.rename(folder)
        atomic.fault(f"{point}.rename")
        atomic.sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Nothing is replaced that somebody may need."""
    if os.path.lexists(out):
        raise UserError(f"{out}: exists; remove it or choose another name")


def copy_parts(base: Path, target: Path, *, without: Collection[str], link: bool) -> None:
    """Bring the files of ``base`` but those below ``without``, names of its top, and hidden ones.

    ``link`` makes hard links of weights where the file system allows.
    """
    for source in hashing.files_below(base):
        relative = source.relative_to(base)
        if relative.parts[0] in without or _hidden(relative):
            continue
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Only weights: nobody edits them in place, while a linked config would be the base's own.
        _bring(source.resolve(), destination, link=link and source.suffix in WEIGHTS)


def copy_config(base: Path, exported: Path) -> None:
    """Bring the config.json of a part."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    atomic.write_json(exported / "config.json", config, point="export.config")


def name_tokenizers(folder: Path) -> None:
    """Name the class that takes ``tokenizer.json`` as it is, in transformers 4 and 5.

    The base model's names may have it rebuilt by other rules, see ``load_tokenizer``.
    """
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name / "tokenizer.json").is_file():
            index[name] = ["transformers", "PreTrainedTokenizerFast"]
    atomic.write_json(index_file, index, point="export.index")


def _rename(temporary: Path, folder: Path) -> None:
    """Where there is nothing; the kernel looks again, and takes an empty folder for nothing."""
    refuse_existing(folder)
    try:
        temporary.rename(folder)
    except OSError:
        refuse_existing(folder)
        raise


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _bring(source: Path, destination: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source, destination)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copy2(source, destination)
