# SPDX-License-Identifier: Apache-2.0
"""How many nodes train together, told by whoever starts ``fastvideo train`` once on each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from fastvideo.errors import UserError

COUNT, RANK = "FASTVIDEO_NODES", "FASTVIDEO_NODE_RANK"
RENDEZVOUS, LAUNCH_ID = "FASTVIDEO_RENDEZVOUS", "FASTVIDEO_LAUNCH_ID"
VARIABLES = (COUNT, RANK, RENDEZVOUS, LAUNCH_ID)
"""All of them, or none, are set on each node."""
RENDEZVOUS_S = 900
"""How long nodes wait for each other."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of one launch, and which of them this is."""

    count: int = 1
    rank: int = 0
    rendezvous: str = ""
    """``host:port`` on node 0 where they meet, a second expert at the next port; empty for a node
    alone."""
    launch_id: str = ""
    """The same on all nodes and new for each start; empty lets a node alone choose."""

    def shifted(self, ports: int) -> Self:
        """The same nodes, meeting so many ports further."""
        host, _, port = self.rendezvous.rpartition(":")
        if not host:
            return self
        return replace(self, rendezvous=f"{host}:{int(port) + ports}")


def read_nodes(environment: Mapping[str, str]) -> Nodes:
    """Read the four variables; without any of them the node is alone.

    A rank ``$NAME`` is the value of the variable ``NAME``: whoever starts all nodes with the same
    environment leaves it to what counts them.

    Raises:
        UserError: One is missing or wrong, with its name.
    """
    found = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not found:
        return Nodes()
    if missing := [name for name in VARIABLES if name not in found]:
        raise UserError(
            f"{' and '.join(found)}: set without {' and '.join(missing)}; set all of "
            f"{', '.join(VARIABLES)} on each node, or none"
        )
    count = _number(found, COUNT, at_least=1)
    rank = read_rank(environment)
    if rank >= count:
        raise UserError(f"{RANK}={rank}: of {COUNT}={count} nodes; count from 0 to {count - 1}")
    _check_rendezvous(found[RENDEZVOUS])
    if not re.fullmatch(r"\w[\w.-]*", found[LAUNCH_ID]):
        raise UserError(
            f"{LAUNCH_ID}={found[LAUNCH_ID]}: names a folder; use letters, digits, '.', '_', '-'"
        )
    return Nodes(count, rank, found[RENDEZVOUS], found[LAUNCH_ID])


def read_rank(environment: Mapping[str, str]) -> int:
    """The number of this node, 0 where nothing is said.

    Raises:
        UserError: It is none, with the name of the variable.
    """
    text = environment.get(RANK, "")
    if not text.startswith("$"):
        return _number({RANK: text or "0"}, RANK, at_least=0)
    name = text[1:]
    if not environment.get(name):
        raise UserError(
            f"{RANK}={text}: {name or 'the variable'} is not set; write the number itself, or the "
            "name of a variable that holds it, e.g. $SLURM_PROCID"
        )
    return _number(environment, name, at_least=0)


def _number(found: Mapping[str, str], name: str, *, at_least: int) -> int:
    text = found[name]
    if not text.isascii() or not text.isdigit() or int(text) < at_least:
        raise UserError(f"{name}={text}: is not a whole number from {at_least}")
    return int(text)


def _check_rendezvous(text: str) -> None:
    host, _, port = text.rpartition(":")
    known = port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    if not host or "/" in host or not known:
        raise UserError(
            f"{RENDEZVOUS}={text}: is not host:port with a port from 1 to 65535, e.g. node1:29500"
        )
