# SPDX-License-Identifier: Apache-2.0
"""A training as a job of the test cluster, and what it has left so far."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo.launch.folder import JobFolder, PartFolder
from fastvideo.launch.word import Word
from fastvideo.models.tiny import write_tiny
from fastvideo.preprocess import preprocess
from fastvideo.state import RunDir, TrainDir
from tests.experts_job import flat
from tests.records import exact
from tests.slurm.lab import Lab
from tests.slurm.user_view import UID
from tests.tiny_world import in_fork, make_world

KEYS: dict[str, Any] = {
    "device": "cpu",
    "deterministic": True,
    "steps": 100_000,
    "global_batch_size": 8,
    "checkpoint": {"every_steps": 10, "keep_every": 10},
    "heldout": {"every_steps": None},
}
CLUSTER = {
    "executor": "slurm",
    "partition": "main",
    "nodes": 2,
    "cpus_per_task": 2,
    "threads": 1,
    "time_minutes": 30,
    "signal_seconds": 50,
    "options": {"exclusive": None},
    "environment": {"MKL_CBWR": "AUTO,STRICT"},
}


@dataclass
class Training:
    """Two processes with FSDP2 on each of two nodes; the user's, on the login node."""

    lab: Lab
    root: Path
    run_dir: Path
    overrides: tuple[str, ...] = ()
    job: str = ""
    """Its number."""
    part: PartFolder = field(default_factory=lambda: PartFolder(Path()))

    @property
    def recipe(self) -> Path:
        return self.root / "job" / "recipe.yaml"

    @property
    def words(self) -> list[str]:
        """The recipe, and what is changed of it."""
        return [str(self.recipe), f"run_dir={self.run_dir}", *self.overrides]

    @property
    def directory(self) -> TrainDir:
        return RunDir(self.run_dir).training()

    def call(self, verb: str, *options: str | Path) -> str:
        """Run a verb on the login node; what it prints."""
        done = self.lab.run(["fastvideo", verb, *self.words, *options])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self) -> None:
        folder = JobFolder(
            Path(self.call("train", "--cluster", self.root / "cluster.yaml").strip())
        )
        self.part = folder.part("train")
        self.job = json.loads(folder.record.read_text())["parts"][0]["slurm_id"]

    def ask(self, field: str) -> str:
        """What the queue knows of the job, e.g. ``%T``, its state."""
        return self.lab.operator(["squeue", "-h", "-t", "all", "-o", field, "-j", self.job]).strip()

    @property
    def restarts(self) -> int:
        about = self.lab.operator(["scontrol", "show", "job", "-o", self.job])
        return int(about.partition(" Restarts=")[2].split()[0])

    @property
    def metrics(self) -> str:
        """The records so far, whole lines."""
        file = self.directory.metrics
        return file.read_text().rpartition("\n")[0] if file.exists() else ""

    @property
    def step(self) -> int:
        return int(json.loads(self.metrics.splitlines()[-1])["step"]) if self.metrics else 0

    @property
    def saved(self) -> int:
        """Step of the newest complete checkpoint."""
        return max(self.directory.complete_checkpoints(), default=0)

    def word(self, restart: int, *, node: int = 0) -> Word:
        """What a node said at the end of a start."""
        word = Word.read(self.part.word(0, restart, node))
        assert word is not None, f"no word of node {node} of start {restart}\n{self.logs()}"
        return word

    def wait(self, is_so: Callable[[], bool], what: str, *, within_s: float = 60) -> None:
        """Wait until something is so; in vain it fails the test with the job's logs."""
        deadline_s = time.monotonic() + within_s
        while not is_so():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"waited {within_s:g} s for {what}\n{self.logs()}")
            time.sleep(0.25)

    def wait_for_steps(self, more: int, *, beyond: int) -> None:
        self.wait(lambda: self.step >= beyond + more, f"step {beyond + more}", within_s=90)

    def logs(self) -> str:
        files = [*self.part.root.glob("log*.txt"), *self.part.ended.glob("*")]
        texts = [f"== {file}\n{file.read_text()[-6000:]}" for file in sorted(files)]
        return "\n".join([self.lab.operator(["scontrol", "show", "job", self.job]), *texts])

    def kill_rank(self, rank: int) -> None:
        """Kill one of the processes that train, as a kernel out of memory does."""
        for folder in Path("/proc").glob("[0-9]*"):
            if self._is_rank(folder, rank):
                os.kill(int(folder.name), signal.SIGKILL)
                return
        raise AssertionError(f"no process of rank {rank} runs\n{self.logs()}")

    def _is_rank(self, process: Path, rank: int) -> bool:
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            ours = any(word.startswith(bytes(self.run_dir)) for word in command)
            if not ours or b"fastvideo.train.node.rank" not in command:
                return False
            return b"RANK=%d" % rank in (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def records(self, *, until: int) -> list[dict[str, Any]]:
        """Of each step, without times."""
        records = [exact(json.loads(line)) for line in self.metrics.splitlines()]
        return [record for record in records if record["step"] <= until]

    def numbers(self, step: int) -> dict[str, Any]:
        """Every number of a checkpoint: weights and optimizer."""
        file = self.root / "numbers.pt"
        dcp_to_torch_save(self.directory.checkpoint(step), file)
        return dict(flat(torch.load(file)))


def lay_out(lab: Lab, root: Path, *, shards: bool = True) -> Training:
    """A training of the user, with its ``shards`` ready or still to be made."""
    write_tiny(root / "model")
    world = make_world(root / "job", clips=7, model=root / "model")
    if shards:
        assert in_fork(lambda: preprocess(world.load())) == 0
    tree = yaml.safe_load(world.recipe.read_text())
    tree["train"] |= KEYS
    tree["parallel"] = {"processes": 2, "shard": 4}
    world.recipe.write_text(yaml.safe_dump(tree))
    (root / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    subprocess.run(["chown", "-R", f"{UID}:{UID}", root], check=True)
    return Training(lab, root, world.run_dir)
