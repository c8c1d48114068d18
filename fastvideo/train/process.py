# SPDX-License-Identifier: Apache-2.0
"""One process among those that train together: its number, its stop request, its sign of life."""

from dataclasses import dataclass
from typing import Protocol


class Stop(Protocol):
    """Where requests to stop arrive."""

    def reason(self) -> str | None:
        """Why to stop, or None."""

    def honour(self) -> None:
        """Remember that this process stops, whatever becomes of the request."""


class Pulse(Protocol):
    """Where a process says how far it is, so that one that hangs can be named."""

    def beat(self, step: int, phase: str) -> None:
        """Say that ``phase`` (``data``, ``forward``, ``backward``, ...) of ``step`` begins."""


@dataclass(frozen=True)
class Process:
    """What a process knows of its place; nothing is guessed from the environment."""

    stop: Stop
    pulse: Pulse
    rank: int = 0
    """Among all processes."""
    local_rank: int = 0
    """Among those of the node; also the number of its GPU."""
    count: int = 1
    """Of all processes."""
