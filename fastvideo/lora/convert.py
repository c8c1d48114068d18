# SPDX-License-Identifier: Apache-2.0
"""LoRA files between formats."""

from pathlib import Path
from typing import Any

from fastvideo.errors import UserError
from fastvideo.lora.places import refuse_existing
from fastvideo.models.lora_header import RANKS, Header, read_header
from fastvideo.models.lora_names import own_name

KINDS = ("wan2.1", "hunyuan-video")
"""A family of each kind of transformer."""


def convert(source: Path, out: Path, *, to: str) -> dict[str, Any]:
    """Read a LoRA in any format and write it as ``diffusers`` or ``comfyui`` reads it.

    Other texts of the file's metadata come along.

    Returns:
        ``{"path": file, "modules": number of adapters, "rank": of most}``.

    Raises:
        UserError: ``out`` exists, or ``source`` is no LoRA of a model of this suite.
    """
    refuse_existing(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the name of a LoRA file ends in .safetensors")
    header = read_header(source)
    family = _family(header)

    from fastvideo.models.lora_file import METADATA, read_lora, write_comfyui, write_lora

    adapter = read_lora(source)
    ours = ("format", METADATA, RANKS)
    about = {key: text for key, text in header.metadata.items() if key not in ours}
    if to == "diffusers":
        write_lora(out, adapter, about=about)
    else:
        write_comfyui(out, adapter, family=family, about=about)
    return {"path": str(out), "modules": len(adapter.pairs()), "rank": adapter.rank}


def _family(header: Header) -> str:
    """Of its names; those that both kinds have are in no LoRA alone."""
    modules = header.sizes()
    unknown = {kind: [m for m in modules if own_name(m, kind) is None] for kind in KINDS}
    fitting = [kind for kind, names in unknown.items() if not names]
    if not fitting:
        names = min(unknown.values(), key=len)
        raise UserError(f"{header.file}: {names[0]} is no projection of Wan or HunyuanVideo")
    return fitting[0]
