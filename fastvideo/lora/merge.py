# SPDX-License-Identifier: Apache-2.0
"""LoRAs into a model's weights: a folder for diffusers, written file by file."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import hashing, model_card
from fastvideo.config.recipe import Export
from fastvideo.errors import UserError
from fastvideo.export_folder import (
    copy_config,
    copy_parts,
    name_tokenizers,
    refuse_existing,
    replacing_folder,
)
from fastvideo.log import logger
from fastvideo.lora.places import ModelFolder, model_folder, naming
from fastvideo.models.lora_folder import Chosen, check_chosen, choose
from fastvideo.state import EXPORT_MARKER, LORA_FILES

if TYPE_CHECKING:
    from torch import Tensor

    from fastvideo.models.lora_pair import Pair
    from fastvideo.models.weights import WeightFiles

KEY = "--lora"


def merge(
    base: str, loras: Sequence[str], out: Path, *, dtype: str | None = None, link: bool = True
) -> dict[str, Any]:
    """Write ``W + sum of scale * alpha / rank * B A`` for the transformers that ``loras`` name.

    The sum is taken in float32 and rounded once. Other parts are the base's files. The folder
    appears complete or not at all.

    Args:
        base: Folder of the model, or its id on the Hub.
        loras: Each ``[TRANSFORMER=]PATH[:SCALE]``.
        out: The folder, which must not exist.
        dtype: Of the merged weights, but for parts that diffusers keeps in float32; None keeps
            that of each tensor.
        link: Untouched weights become hard links where the file system allows.

    Returns:
        ``{"path": folder, "loras": {transformer: [{"file", "scale"}, ...]}}``.

    Raises:
        UserError: A LoRA does not fit, the model is damaged, sums are not finite, or ``out``
            exists.
    """
    refuse_existing(out)
    model = model_folder(base, option="--base")
    chosen = [lora for text in loras for lora in _parse(text, known=model.transformers)]
    with naming("--base"):
        check_chosen(chosen, model.path, model.family)
    merged: dict[str, list[Chosen]] = defaultdict(list)
    for lora in chosen:
        merged[lora.transformer].append(lora)
    with replacing_folder(out, point="lora") as temporary, naming("--base"):
        without = (*merged, model_card.NAME, EXPORT_MARKER)
        copy_parts(model.path, temporary, without=without, link=link)
        for name, parts in merged.items():
            _merge_transformer(model, temporary / name, parts, dtype=dtype)
        name_tokenizers(temporary)
        card = model_card.merged_text(base, model.path, _about(merged))
        (temporary / model_card.NAME).write_text(card, encoding="utf-8")
    logger.info("merged %d LoRA files into %s", len(chosen), out)
    return {"path": str(out), "loras": _about(merged)}


def _parse(text: str, *, known: Sequence[str]) -> list[Chosen]:
    """``[TRANSFORMER=]PATH[:SCALE]``."""
    name, equals, rest = text.partition("=")
    transformer, rest = (name, rest) if equals and name in LORA_FILES else (None, text)
    path, colon, number = rest.rpartition(":")
    scale = _number(number) if colon and not Path(rest).exists() else None
    path = rest if scale is None else path
    return choose(
        Path(path).expanduser(),
        scale=1.0 if scale is None else scale,
        transformer=transformer,
        known=known,
        key=f"{KEY} {text}",
    )


def _number(text: str) -> float | None:
    try:
        scale = float(text)
    except ValueError:
        return None
    if scale - scale != 0:
        raise UserError(f"{KEY}: the scale {text} is not finite")
    return scale


def _about(merged: Mapping[str, Sequence[Chosen]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {"file": str(p.file), "scale": p.scale, "sha256": hashing.file_sha256(p.file)}
            for p in parts
        ]
        for name, parts in merged.items()
    }


def _merge_transformer(
    model: ModelFolder, target: Path, parts: Sequence[Chosen], *, dtype: str | None
) -> None:
    from fastvideo.export_weights import write_files
    from fastvideo.models.lora_file import read_lora
    from fastvideo.models.weights import WeightFiles

    files = WeightFiles(model.path, folder=target.name)
    changes = [(read_lora(part.file).pairs(), part.scale) for part in parts]
    write_files(
        target,
        like=_like(model, files, dtype=dtype),
        read=partial(_merged, files, changes),
        max_bytes=int(Export().max_shard_gib * 2**30),
    )
    copy_config(model.path / target.name, target)


def _like(model: ModelFolder, files: "WeightFiles", *, dtype: str | None) -> dict[str, "Tensor"]:
    """Tensors of the meta device: the shapes and dtypes to write."""
    import torch

    if dtype is None:
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            for name, stored in files.tensors.items()
        }
    import diffusers

    from fastvideo.models.parts import empty_part, refuse_missing

    hunyuan = model.family == "hunyuan-video"
    kind = "HunyuanVideoTransformer3DModel" if hunyuan else "WanTransformer3DModel"
    made = empty_part(getattr(diffusers, kind), model.path, files.folder, dtype=dtype)
    wanted: dict[str, Tensor] = made.state_dict()
    refuse_missing(wanted.keys() - files.tensors.keys(), files.path, files.folder)
    return wanted


def _merged(
    files: "WeightFiles",
    changes: Sequence[tuple[Mapping[str, "Pair"], float]],
    like: Mapping[str, "Tensor"],
) -> dict[str, "Tensor"]:
    """Read tensors of the base and add what the LoRAs change in them."""
    from fastvideo.models.lora_pair import is_finite

    found = {}
    for name, wanted in like.items():
        before = tensor = files.read(name)
        module, _, kind = name.rpartition(".")
        for pairs, scale in changes:
            if module in pairs and (change := pairs[module].change(kind)) is not None:
                tensor = tensor.float() + scale * change.reshape(tensor.shape)
        found[name] = tensor.to(wanted.dtype)
        if not is_finite(found[name]):
            raise UserError(_not_finite(files, name, before, found[name]))
    return found


def _not_finite(files: "WeightFiles", name: str, before: "Tensor", after: "Tensor") -> str:
    from fastvideo.models.lora_pair import is_finite

    where = f"{files.path / files.folder}: {name}"
    if not is_finite(before):
        return f"{where} is not finite; the model is damaged, fetch it again"
    dtype = str(after.dtype).removeprefix("torch.")
    return f"{where} is too large for {dtype} with the LoRAs; give another --dtype or scale"
