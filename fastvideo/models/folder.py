# SPDX-License-Identifier: Apache-2.0
"""A model folder in diffusers format: found, its configs read, its faults explained; no torch."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo.errors import UserError
from fastvideo.hashing import HashCache, files_below, fingerprint

TRACES = ("_diffusers_version", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of a config that do not say what the model computes; recipes choose the dtype."""


def find_model(path: str) -> Path:
    """Return the folder of a model: a local one, or a snapshot of a Hugging Face repository.

    Raises:
        UserError: There is no such folder, and the Hub has it not or cannot be reached.
    """
    folder = Path(path).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise UserError(f"model.path={path}: has no model_index.json; give a diffusers folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path, re.ASCII):
        raise UserError(f"model.path={path}: there is no such folder")
    if Path(path).name.startswith("tiny_"):
        raise UserError(
            f"model.path={path}: there is no such folder; `fastvideo tiny` with this recipe writes "
            "it"
        )
    return _from_hub(path)


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.path={repository}: neither a folder here nor in the Hugging Face cache, and "
            f"the Hub did not give it ({reason}); fetch it where there is a network with "
            f"`hf download {repository}`, or write the path of a folder"
        ) from None


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a model folder."""
    try:
        config = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model.path={path}: has no {name}; give a whole diffusers folder"
        ) from None
    except ValueError as error:
        raise UserError(f"model.path={path}: {name} is damaged ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"model.path={path}: {name} is damaged (no table); fetch it again")
    return config


@contextlib.contextmanager
def loading(path: Path, part: str) -> Iterator[None]:
    """Turn what the libraries raise on a missing, cut or foreign part into a ``UserError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.path={path}: its {part} cannot be loaded ({reason}); fetch it again, or give "
            "a whole diffusers folder of the recipe's model.family"
        ) from error


def content_hash(file: Path, hashes: HashCache) -> str:
    """Hash of what a file of a model says: configs without the traces of what wrote them.

    So 1.3B and 14B, whose repositories hold the same encoders, share their shards.
    """
    if file.name != "config.json":
        return hashes.sha256(file)
    return fingerprint(without_traces(json.loads(file.read_text(encoding="utf-8"))))


def without_traces(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that only say what wrote it."""
    return {key: config[key] for key in config if key not in TRACES}


def weights_sample(path: Path, folder: str) -> str:
    """A fingerprint of a part's safetensors files: their sizes, headers and some of their numbers.

    Tells a model from its finetune without reading it whole, wherever it lies.
    """
    entries = [
        [file.name, file.stat().st_size, _sample(file)]
        for file in sorted((path / folder).glob("*.safetensors"))
    ]
    return fingerprint(entries)


def _sample(file: Path, *, blocks: int = 64, block_bytes: int = 4096) -> str:
    """SHA-256 of a file's first bytes and of blocks that are spread over it."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        for number in range(blocks + 1):
            stream.seek(max(0, size - block_bytes) * number // blocks)
            digest.update(stream.read(block_bytes))
    return digest.hexdigest()


def files_of(path: Path, *folders: str) -> list[Path]:
    """All files of some folders of a model, sorted; a ``UserError`` for an empty folder."""
    found = []
    for folder in folders:
        files = [f for f in files_below(path / folder) if not f.name.startswith(".")]
        if not files:
            raise UserError(f"model.path={path}: has no {folder}/; give a whole diffusers folder")
        found += files
    return found
