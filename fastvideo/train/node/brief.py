# SPDX-License-Identifier: Apache-2.0
"""What the node's parent tells the processes it starts, and the files of one launch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fastvideo import atomic
from fastvideo.config.recipe import Recipe
from fastvideo.state import RunDir, TrainDir
from fastvideo.train.node.nodes import Nodes


@dataclass(frozen=True)
class LaunchDir:
    """Names of the files of one launch; its nodes share the folder."""

    root: Path

    def brief(self, node: int) -> Path:
        """What the processes of a node are told."""
        return self.root / f"node-{node}.brief.json"

    def node_log(self, node: int) -> Path:
        """What torchrun says on a node."""
        return self.root / f"node-{node}.log"

    def ended(self, node: int) -> Path:
        """How the processes of a node ended, as torchrun saw it."""
        return self.root / f"node-{node}.ended.json"

    def hang(self, node: int) -> Path:
        """Which process of a node hangs."""
        return self.root / f"node-{node}.hang.json"

    def rank_log(self, rank: int) -> Path:
        """What a process says."""
        return self.root / f"rank-{rank}.log"

    def outcome(self, rank: int) -> Path:
        """How a process ended, in its own words."""
        return self.root / f"rank-{rank}.json"

    @property
    def stop(self) -> Path:
        """The parent's request to stop; holds the reason."""
        return self.root / "stop"


@dataclass(frozen=True)
class Brief:
    """What the processes of a node need to know."""

    recipe: dict[str, Any]
    transformer: str
    about: dict[str, Any]
    """``shift`` and ``interval`` of the noise levels, and what else checkpoints say."""
    folder: str
    """Of the launch."""
    processes: int
    """Of this node."""
    nodes: Nodes
    pulses: str
    """Where processes of this node write their beats."""
    parent: int
    """Process id of the node's parent."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``write`` wrote."""
        tree = atomic.read_json(path)
        return cls(**{**tree, "nodes": Nodes(**tree["nodes"])})

    def write(self, path: Path) -> None:
        """Write JSON."""
        atomic.write_json(path, dataclasses.asdict(self), point="brief")

    @property
    def launch(self) -> LaunchDir:
        """Files of the launch."""
        return LaunchDir(Path(self.folder))

    def load_recipe(self) -> Recipe:
        """The recipe, as the parent resolved it."""
        return Recipe.parse(self.recipe, origin=self.folder)

    @property
    def directory(self) -> TrainDir:
        """Where it trains."""
        return RunDir(Path(self.recipe["run_dir"])).training(self.transformer)
