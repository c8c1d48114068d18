# SPDX-License-Identifier: Apache-2.0
"""How the processes of a launch ended, and which of them was the first to fail."""

import contextlib
import dataclasses
import json
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastvideo import atomic
from fastvideo.errors import Failed, Stopped, UserError
from fastvideo.train.node.brief import LaunchDir

Kind = Literal["finished", "stopped", "user_error", "failed", "error"]
SHOWN_LINES = 12
CLOCKS_S = 2
"""What the clocks of nodes differ by, and what torchrun takes to see a death."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended, in its own words."""

    rank: int
    kind: Kind
    step: int
    """The last that it began."""
    message: str = ""
    traceback: str = ""
    host: str = dataclasses.field(default_factory=socket.gethostname)
    time: float = dataclasses.field(default_factory=time.time)
    by_person: bool = False
    """Of a stop: whether a person asked for it, rather than a queue."""

    def write(self, launch: LaunchDir) -> None:
        """Write it to its place in the launch folder."""
        atomic.write_json(launch.outcome(self.rank), dataclasses.asdict(self), point="outcome")

    def text(self) -> str:
        """It as one line that ``read_outcomes`` understands; the end of a long traceback."""
        shown = "\n".join(self.traceback.rstrip().splitlines()[-SHOWN_LINES:])
        short = dataclasses.replace(self, message=self.message[:1500], traceback=shown[-2500:])
        return json.dumps(dataclasses.asdict(short), ensure_ascii=False)


@dataclass(frozen=True)
class Death:
    """How a process ended that could not say it itself, as torchrun saw it."""

    rank: int
    pid: int
    host: str
    exit_code: int
    signal: str
    """Name, empty if none ended it."""
    time: float
    """When it was seen, whole seconds."""
    step: int
    """The last that it began."""


def read_outcomes(launch: LaunchDir, words: Iterable[str] = ()) -> dict[int, Outcome]:
    """Outcomes by rank: those in the launch folder, and those told as ``words``."""
    trees = [tree for _, tree in _read(launch, "rank-*.json")]
    written = {tree["rank"]: Outcome(**tree) for tree in trees}
    return {**parse_words(words), **written}  # the file says more, if there is one


def parse_words(words: Iterable[str]) -> dict[int, Outcome]:
    """Outcomes by rank, as ``Outcome.text`` wrote them."""
    trees = []
    for text in words:
        with contextlib.suppress(json.JSONDecodeError):  # more than there was room for
            trees.append(json.loads(text))
    return {tree["rank"]: Outcome(**tree) for tree in trees}


def read_deaths(launch: LaunchDir) -> list[Death]:
    """Processes that ended with an error, of all nodes, earliest first."""
    trees = [tree for _, tree in _read(launch, "node-*.ended.json")]
    deaths = [Death(**death) for tree in trees for death in tree["deaths"]]
    return sorted(deaths, key=lambda death: death.time)


def failed_nodes(launch: LaunchDir) -> set[int]:
    """Nodes whose processes failed or hang."""
    ended = {node for node, tree in _read(launch, "node-*.ended.json") if tree["error"]}
    return ended | {node for node, _ in _read(launch, "node-*.hang.json")}


def tell_early(launch: LaunchDir, node: int, error: Exception | Stopped) -> None:
    """Write down for the other nodes why one ends before its processes can say it.

    One that ends because another node did has nothing to say.
    """
    kind: Kind = "user_error" if isinstance(error, UserError) else "failed"
    report = {
        "deaths": [],
        "error": str(error) or type(error).__name__,
        "kind": "stopped" if isinstance(error, Stopped) else kind,
        "by_person": isinstance(error, Stopped) and error.by_person,
    }
    with contextlib.suppress(OSError):  # a full disk, say
        if not launch.ended(node).exists() and not failed_nodes(launch):
            atomic.write_json(launch.ended(node), report, point="ended")


def early_end(launch: LaunchDir) -> Stopped | UserError | Failed | None:
    """Why a node ended before its processes trained, if one did."""
    kinds: dict[str, type[UserError | Failed]] = {"user_error": UserError, "failed": Failed}
    for node, tree in _read(launch, "node-*.ended.json"):
        message = f"node {node}: {tree['error']}"
        if tree.get("kind") == "stopped":
            return Stopped(message, by_person=tree["by_person"])
        if tree.get("kind") in kinds:
            return kinds[tree["kind"]](message)
    return None


def is_broken_by_stop(
    launch: LaunchDir, words: Sequence[str], *, asked_s: float, saved: int
) -> bool:
    """Whether all that went wrong are errors after a stop was asked for and before a step was done.

    The signal of a queue reaches what a process started to compile too, which fails then.
    """
    outcomes = read_outcomes(launch, words).values()
    errors = [outcome for outcome in outcomes if outcome.kind not in ("finished", "stopped")]
    killed = any(death.signal == "SIGKILL" for death in read_deaths(launch))
    after = all(
        error.kind == "error" and error.step <= saved + 1 and error.time >= asked_s - CLOCKS_S
        for error in errors
    )
    return bool(errors) and after and not killed


def _read(launch: LaunchDir, pattern: str) -> list[tuple[int, Any]]:
    """Number and content of each file."""
    found = []
    for path in sorted(launch.root.glob(pattern)):
        number = re.search(r"\d+", path.name)
        tree = atomic.read_json(path)
        if number and isinstance(tree, dict):
            found.append((int(number[0]), tree))
    return found


def first_failure(launch: LaunchDir, words: Sequence[str] = ()) -> UserError | Failed:
    """What went wrong first, for the user.

    What processes say they know counts before what happened to them: a hang, a mistake in the
    input, a full disk unless one was killed before; then a death by a signal, which leaves the
    others without a partner; then errors by time, for those that lost their partner say so too. A
    process that torchrun kills because another one failed is killed seconds later, and is not the
    first; one that libraries abort because it lost its partner is not before what that one says.
    """
    hangs = sorted((tree for _, tree in _read(launch, "node-*.hang.json")), key=_time)
    if hangs:
        return Failed(hangs[0]["message"])
    by_rank = read_outcomes(launch, words)
    outcomes = sorted(by_rank.values(), key=lambda outcome: outcome.time)
    deaths = [death for death in read_deaths(launch) if death.rank not in by_rank]
    for outcome in outcomes:
        if outcome.kind == "user_error":
            return UserError(outcome.message)
    known = [outcome for outcome in outcomes if outcome.kind == "failed"]
    killed = [death for death in deaths if death.signal not in ("", "SIGABRT")]
    if known and killed and killed[0].time <= known[0].time + CLOCKS_S:
        return Failed(_describe_death(killed[0], launch))
    if known:
        return Failed(_describe(known[0], launch))
    errors = [outcome for outcome in outcomes if outcome.kind == "error"]
    first_s = min([death.time for death in deaths] + [error.time for error in errors], default=0)
    for death in deaths:
        if death.signal and death.time <= first_s + CLOCKS_S:
            return Failed(_describe_death(death, launch))
    if errors:
        return Failed(_describe(errors[0], launch))
    return _without_words(deaths, launch)


def _time(tree: Any) -> float:
    return float(tree["time"])


def _describe(outcome: Outcome, launch: LaunchDir) -> str:
    where = f"rank {outcome.rank} on {outcome.host}, last step {outcome.step}"
    lines = outcome.traceback.rstrip().splitlines()[-SHOWN_LINES:]
    shown = "".join(f"\n  {line}" for line in lines)
    return f"{where}: {outcome.message}{shown}\nsee {launch.rank_log(outcome.rank)}"


def _describe_death(death: Death, launch: LaunchDir) -> str:
    likely = ", most likely out of host memory" if death.signal == "SIGKILL" else ""
    return (
        f"rank {death.rank} (process {death.pid} on {death.host}) was killed by {death.signal}"
        f"{likely}; last step {death.step}; see {launch.rank_log(death.rank)}"
    )


def _without_words(deaths: Sequence[Death], launch: LaunchDir) -> Failed:
    for death in deaths:
        how = f"was killed by {death.signal}" if death.signal else f"exited with {death.exit_code}"
        return Failed(
            f"rank {death.rank} (process {death.pid} on {death.host}) {how}; last step "
            f"{death.step}; see {launch.root}"
        )
    for node, tree in _read(launch, "node-*.ended.json"):
        if tree["error"]:
            return Failed(f"node {node}: {tree['error']}; see {launch.node_log(node)}")
    return Failed(f"the processes ended without a word; see {launch.root}")
