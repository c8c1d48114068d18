# SPDX-License-Identifier: Apache-2.0
"""Which projections of a transformer get an adapter."""

import re
from collections.abc import Collection

from fastvideo.config.train import Lora
from fastvideo.errors import UserError

BLOCK = r"(?:blocks|transformer_blocks|single_transformer_blocks)\.\d+\."
"""How the names of what lies in the repeated blocks begin."""
_ATTENTION = (
    r"(?:attn|attn1|attn2)\."
    r"(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
)
_FEED_FORWARD = r"(?:ffn|ff|ff_context)\.net\.(?:0\.proj|2)|proj_mlp|proj_out"
PRESETS = {
    "attention": (f"{BLOCK}{_ATTENTION}",),
    "blocks": (f"{BLOCK}(?:{_ATTENTION}|{_FEED_FORWARD})",),
}
"""Patterns of whole names by preset, for Wan and HunyuanVideo as diffusers names their modules."""


def targets(method: Lora, names: Collection[str]) -> list[str]:
    """Choose among the names of a transformer's projections, in their order.

    Raises:
        UserError: A pattern matches none of ``names``.
    """
    given = isinstance(method.targets, tuple)
    patterns = method.targets if isinstance(method.targets, tuple) else PRESETS[method.targets]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            examples = ", ".join(sorted(names)[:3])
            raise UserError(
                f"train.method.targets: {pattern if given else method.targets!r} matches no "
                f"projection of this model, whose names are like {examples}; a pattern must match "
                "a whole name"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]
