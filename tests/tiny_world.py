# SPDX-License-Identifier: Apache-2.0
"""A small real job for tests: real mp4 files, a tiny model of the real architecture, a recipe."""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fastvideo.cli import run
from fastvideo.config.recipe import Recipe
from fastvideo.generate import write_video

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "white": (240,) * 3}
WAYS = {"right": (0, 4), "left": (0, -4), "down": (4, 0), "up": (-4, 0)}


def write_clip(path: Path, *, index: int, num_frames: int = 20, fps: int = 16) -> str:
    """Write a coloured square moving over a gradient; the caption says colour and way."""
    colour = list(COLOURS)[index % 4]
    way = list(WAYS)[(index // 4 + index) % 4]
    dy, dx = WAYS[way]
    ramp = np.linspace(10, 90, 96, dtype=np.uint8)
    frames = np.empty((num_frames, 64, 96, 3), np.uint8)
    frames[:] = ramp[None, None, :, None] + np.uint8(5 * (index // 4))
    for t, frame in enumerate(frames):
        y, x = (24 + dy * t) % 48, (40 + dx * t) % 80
        frame[y : y + 16, x : x + 16] = COLOURS[colour]
    write_video(path, frames, fps=fps)
    return f"a {colour} square moves {way}, number {index}"


@dataclass(frozen=True)
class World:
    """Paths of one job; ``recipe`` is a file."""

    root: Path
    recipe: Path

    def load(self, *overrides: str) -> Recipe:
        """The recipe with overrides."""
        return Recipe.load(self.recipe, overrides)

    @property
    def items(self) -> list[dict[str, Any]]:
        """Content of videos2caption.json."""
        items: list[dict[str, Any]] = json.loads(self._captions.read_text())
        return items

    def write_items(self, items: list[dict[str, Any]]) -> None:
        """Replace videos2caption.json."""
        self._captions.write_text(json.dumps(items))

    def add_clip(self, index: int, **extra: Any) -> None:
        """Add one more clip to the data set."""
        caption = write_clip(self.root / f"clips/videos/{index}.mp4", index=index)
        items = self.items if self._captions.exists() else []
        self.write_items([*items, {"path": f"{index}.mp4", "cap": [caption], **extra}])

    @property
    def _captions(self) -> Path:
        return self.root / "clips/videos2caption.json"

    @property
    def shards(self) -> Path:
        """Where preprocessing writes."""
        return self.root / "shards"

    @property
    def run_dir(self) -> Path:
        """Where training writes."""
        return self.root / "run"


@dataclass(frozen=True)
class Pair:
    """A family and a task, and the width of clips that suits both VAE and speed."""

    family: str = "wan2.1"
    task: str = "t2v"
    width: int = 48

    def __str__(self) -> str:
        return f"{self.family}-{self.task}"


WAN21 = Pair()
PAIRS = (
    WAN21,
    Pair(task="i2v"),
    Pair("wan2.2-a14b"),
    Pair("wan2.2-a14b", "i2v"),
    Pair("wan2.2-ti2v-5b", width=64),
    Pair("wan2.2-ti2v-5b", "i2v", width=64),
    Pair("hunyuan-video"),
)
"""Every model of the suite, for every task it has."""


def make_world(
    root: Path, *, clips: int, model: Path, heldout: int = 0, pair: Pair = WAN21
) -> World:
    """Lay out a job with ``clips`` training and ``heldout`` held-out clips."""
    (root / "clips/videos").mkdir(parents=True)
    write_prompts(root, task=pair.task)
    tree: Mapping[str, Any] = {
        "model": {"family": pair.family, "task": pair.task, "path": str(model)},
        "clip": {"num_frames": 9, "height": 32, "width": pair.width, "fps": 8},
        "source": {"kind": "merged", "path": str(root / "clips")},
        "shards": {"path": str(root / "shards"), "rows": 3, "text_dtype": "float32"},
        "run_dir": str(root / "run"),
        "preprocess": {"decode_workers": 0},
        "validation": {"prompts": str(root / "prompts.json")},
        "train": {
            "steps": 6,
            "global_batch_size": 2,
            "optimizer": {"lr": 1e-3},
            "dtype": "float32",
            "checkpoint": {"every_steps": 2},
            "heldout": {"every_steps": 3, "num_timesteps": 2},
            "log_every_steps": 1,
            "loader_workers": 0,
        },
        "generate": {
            "prompts": str(root / "prompts.json"),
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "dtype": "float32",
        },
    }
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    world = World(root, recipe)
    for index in range(clips + heldout):
        world.add_clip(index, split="train" if index < clips else "heldout")
    return world


def write_prompts(root: Path, *, task: str) -> None:
    """Two prompts; for image-to-video with an image and a video as first images."""
    prompts: list[Any] = ["a red square moves right", "nothing at all"]
    if task == "i2v":
        pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
        Image.fromarray(pixels).save(root / "first.png")
        write_clip(root / "first.mp4", index=3, num_frames=3)
        files = {"image_path": "first.png"}, {"video_path": "first.mp4"}
        prompts = [{"caption": text, **file} for text, file in zip(prompts, files, strict=True)]
    (root / "prompts.json").write_text(json.dumps(prompts))


def in_fork(
    action: Callable[[], object],
    *,
    fault: str = "",
    fault_log: Path | None = None,
    kill_after_s: float | None = None,
) -> int:
    """Run ``action`` in a forked child; return its exit code, -9 if it was killed.

    A fork shares the modules already imported, so that a hundred kills take seconds.
    """
    environment = {"FASTVIDEO_FAULT": fault, "FASTVIDEO_FAULT_LOG": str(fault_log or "")}
    child = start_fork(action, environment=environment)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return wait_for(child)


@dataclass(frozen=True)
class Done:
    """What a command of a forked process left."""

    code: int
    out: str
    err: str


def fastvideo(verb: str, world: World, *arguments: str) -> Done:
    """Run ``fastvideo VERB RECIPE ...`` in a fork, with output of its own."""
    out, err = world.root / "stdout.txt", world.root / "stderr.txt"
    code = wait_for(start_command(verb, world, *arguments))
    return Done(code, out.read_text(), err.read_text())


def start_command(verb: str, world: World, *arguments: str) -> int:
    """Start ``fastvideo VERB RECIPE ...`` in a fork; its process id."""

    def command() -> int:
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(world.root / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        return run([verb, str(world.recipe), *arguments])

    return start_fork(command, environment={})


def start_fork(action: Callable[[], object], *, environment: Mapping[str, str]) -> int:
    """Start ``action`` in a forked child that exits with its result; the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(action, environment)
    return child


def wait_for(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return wait_for_all([child])[0]


def wait_for_all(children: Iterable[int]) -> list[int]:
    """Wait for children, as `wait_for`; a test that runs out of time takes them with it."""
    left, codes = list(children), []
    try:
        while left:
            _, status = os.waitpid(left[0], 0)
            codes.append(os.waitstatus_to_exitcode(status))
            left.pop(0)
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


def _child(action: Callable[[], object], environment: Mapping[str, str]) -> None:
    code = 1
    try:
        os.environ.update(environment)
        result = action()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def passes(fault_log: Path) -> list[str]:
    """Every fault point of a logged run, the n-th pass of a point as ``point:n``."""
    seen: dict[str, int] = {}
    points = []
    for point in fault_log.read_text().split():
        seen[point] = seen.get(point, 0) + 1
        points.append(f"{point}:{seen[point]}")
    return points


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files of ``folder`` that match, hidden leftovers of kills included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
