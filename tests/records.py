# SPDX-License-Identifier: Apache-2.0
"""What of a line of metrics.jsonl is the same however fast a machine is."""

from collections.abc import Mapping
from typing import Any

EXACT = (
    "step",
    "samples",
    "tokens",
    "epoch",
    "loss",
    "grad_norm",
    "lr",
    "skipped_steps",
    "heldout_loss",
    "heldout_loss_by_quantile",
)


def exact(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a repeated training must repeat."""
    return {key: record[key] for key in EXACT if key in record}
