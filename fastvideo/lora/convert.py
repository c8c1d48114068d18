# SPDX-License-Identifier: Apache-2.0
"""LoRA files between formats."""

from pathlib import Path
from typing import Any

from fastvideo.cost.transformer import is_hunyuan
from fastvideo.errors import UserError
from fastvideo.export_folder import refuse_existing
from fastvideo.models.lora_header import RANKS, Header, fitting_releases, read_header
from fastvideo.models.lora_names import own_name

KINDS = ("wan2.1", "hunyuan-video")
"""A family of each kind of transformer."""


def convert(source: Path, out: Path, *, to: str, family: str | None = None) -> dict[str, Any]:
    """Read a LoRA in any format and write it as ``diffusers`` or ``comfyui`` reads it.

    Other texts of the file's metadata come along.

    Args:
        source: The file.
        out: The file to write, which must not exist.
        to: Whose names it gets.
        family: Of the model; None tells it by names and shapes.

    Returns:
        ``{"path": file, "modules": number of adapters, "rank": of most}``.

    Raises:
        UserError: ``out`` exists, ``source`` is no LoRA of a model of this suite or of ``family``,
            or ComfyUI's names depend on a family that cannot be told.
    """
    refuse_existing(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the name of a LoRA file ends in .safetensors")
    header = read_header(source)
    kinds = _kinds(header, family)
    kind = _told(header, kinds) if to == "comfyui" else None

    from fastvideo.models.lora_file import METADATA, read_lora, write_comfyui, write_lora

    adapter = read_lora(source)
    ours = ("format", METADATA, RANKS)
    about = {key: text for key, text in header.metadata.items() if key not in ours}
    refuse_existing(out)  # it may have come in the meantime
    if kind is None:
        write_lora(out, adapter, about=about)
    else:
        write_comfyui(out, adapter, family=kind, about=about)
    return {"path": str(out), "modules": len(adapter.pairs()), "rank": adapter.rank}


def _kinds(header: Header, family: str | None) -> list[str]:
    """Those of `KINDS` that have all projections of the file, or the one of ``family``."""
    wanted = [kind for kind in KINDS if family is None or is_hunyuan(kind) == is_hunyuan(family)]
    modules = header.sizes()
    unknown = {kind: [m for m in modules if own_name(m, kind) is None] for kind in wanted}
    fitting = [kind for kind, names in unknown.items() if not names]
    if not fitting:
        names = min(unknown.values(), key=len)
        model = family or "Wan or HunyuanVideo"
        raise UserError(f"{header.file}: {names[0]} is no projection of {model}")
    return fitting


def _told(header: Header, kinds: list[str]) -> str:
    """Tell by shapes which of several kinds it is, whose names are the same in diffusers."""
    if len(kinds) > 1:
        fitting = {is_hunyuan(release.family) for release in fitting_releases(header.sizes())}
        kinds = [kind for kind in kinds if is_hunyuan(kind) in fitting] or kinds
    if len(kinds) > 1:
        raise UserError(
            f"{header.file}: its projections may be those of {' or '.join(kinds)}, which ComfyUI "
            "names differently; say which with --family"
        )
    return kinds[0]
