# SPDX-License-Identifier: Apache-2.0
"""Our training step against plain diffusers and torch: time, MFU and memory, in one run.

    python benchmarks/bench_train.py                        # CPU, tiny model
    python benchmarks/bench_train.py --device cuda          # Wan2.1 1.3B, up to 81 x 480 x 832
    python benchmarks/bench_train.py --json benchmarks/results/NAME.json

The peer is what a careful user writes without us: the diffusers model, autocast, gradient
checkpointing where ours recomputes, clipping, torch's fused AdamW; eager, nothing else. Both train
the same random weights on samples of the same shapes that are in host memory already. Each variant
runs in a process of its own, variants take turns, and medians are compared: time on
the wall, and time of the host's cores, which says more on a machine that is not quiet.
"""

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvideo.config.architectures import release
from fastvideo.config.recipe import Recipe
from fastvideo.cost import flops
from fastvideo.cost.devices import find_device, mfu
from fastvideo.cost.layout import Layout
from fastvideo.data.loader import Place
from fastvideo.models import flow
from fastvideo.models.family import Text, find_family
from fastvideo.models.tiny import write_tiny
from fastvideo.state import RunDir
from fastvideo.train import loop, worker
from fastvideo.train.draw import Drawn, collate
from fastvideo.train.method import build_method
from fastvideo.train.metrics import peak_memory_gib
from fastvideo.train.parallel import Runner, Team
from fastvideo.train.process import Process


@dataclass(frozen=True)
class Case:
    """A model and a shape of clips."""

    name: str
    release: str | None
    """Configuration of a released checkpoint; None is the tiny model."""
    num_frames: int
    height: int
    width: int
    batch: int
    text_tokens: int
    dtype: str
    recompute: str
    warmup: int
    """Steps before those that count; these are looked at in windows of as many."""
    steps: int


CPU_CASES = (
    Case("tiny, 48 tokens", None, 9, 64, 64, 4, 32, "float32", "none", 5, 40),
    Case("tiny, 2,304 tokens", None, 33, 256, 256, 1, 64, "float32", "none", 2, 6),
)
GPU_CASES = (
    Case("1.3B, 17x480x832", "wan2.1_t2v_1.3b", 17, 480, 832, 1, 120, "bfloat16", "none", 4, 12),
    Case("1.3B, 81x256x448", "wan2.1_t2v_1.3b", 81, 256, 448, 1, 120, "bfloat16", "full", 4, 12),
    Case("1.3B, 81x480x832", "wan2.1_t2v_1.3b", 81, 480, 832, 1, 120, "bfloat16", "full", 3, 8),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain diffusers": {},
    "fastvideo": {},
    "fastvideo, selective": {"activation_checkpointing": "selective"},
    "fastvideo, compiled": {"compile": True},
    "fastvideo, selective, compiled": {"activation_checkpointing": "selective", "compile": True},
}
BOTH = ("plain diffusers", "fastvideo")


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = CPU_CASES if arguments.device == "cpu" else GPU_CASES
    if arguments.one:
        case = next(case for case in cases if case.name == arguments.one[0])
        print(json.dumps(measure(case, arguments.one[1], arguments.device)))
        return
    results = [compare(case, arguments.device, arguments.rounds) for case in cases]
    if arguments.json:
        figures = {"machine": machine(arguments.device), "cases": results}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def compare(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Run the variants of a case in turns; medians, printed as they come."""
    variants = BOTH if device == "cpu" else tuple(VARIANTS)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            found[variant].append(in_a_process(case, variant, device))
    medians = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }
    plain = medians[BOTH[0]]
    print(f"{case.name}, batch {case.batch}, {case.dtype}, recompute {case.recompute}")
    for variant, run in medians.items():
        speed = plain["step_s"] / run["step_s"]
        cores = plain["host_s"] / run["host_s"]
        share = f"  MFU {run['mfu']:.1%}" if "mfu" in run else ""
        print(
            f"  {variant:<32}{run['step_s'] * 1e3:10.1f} ms/step  {speed:5.2f} x  "
            f"{run['host_s'] * 1e3:10.1f} ms of cores  {cores:5.2f} x  "
            f"{run['memory_gib']:7.2f} GiB{share}",
            flush=True,
        )
    return {"case": asdict(case), "rounds": rounds, "medians": medians}


def in_a_process(case: Case, variant: str, device: str) -> dict[str, float]:
    """Measure in a fresh process, so that memory and caches are its own."""
    command = [sys.executable, __file__, "--device", device, "--one", case.name, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case.name}, {variant}:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(case: Case, variant: str, device: str) -> dict[str, float]:
    """Seconds of a step, peak memory, and MFU where the device is known."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(case, variant, Path(folder), device)
        config = write_model(case, Path(recipe.model.path))
        run = plain_steps if variant == BOTH[0] else our_steps
        windows = Windows(case, device)
        run(case, recipe, config, windows)
    step_s, host_s = windows.medians()
    figures = {"step_s": step_s, "host_s": host_s, "memory_gib": peak_memory_gib(device)}
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    if known := find_device(name):
        per_step = flops.training_flops(recipe, config).actual * case.batch
        figures["mfu"] = mfu(per_step, seconds=step_s, device=known, processes=1, dtype=case.dtype)
    return figures


def recipe_of(case: Case, variant: str, folder: Path, device: str) -> Recipe:
    """The recipe of a case; nothing but the model's configuration is on disk."""
    train = {
        "steps": case.warmup + case.steps,
        "global_batch_size": case.batch,
        "dtype": case.dtype,
        "device": device,
        "activation_checkpointing": case.recompute,
        "loader_workers": 0,  # nothing is read
        "log_every_steps": case.warmup,
        "heldout": {"every_steps": None},
        "checkpoint": {"every_steps": 10**6},
        "tensorboard": False,
    }
    clip = {"num_frames": case.num_frames, "height": case.height, "width": case.width}
    tree = {
        "model": {"family": "wan2.1", "path": str(folder / "model")},
        "clip": clip,
        "source": {"kind": "merged", "path": str(folder / "clips")},
        "shards": {"path": str(folder / "shards")},
        "run_dir": str(folder / "run"),
        "train": train | VARIANTS[variant],
    }
    return Recipe.parse(tree, origin="benchmark")


def write_model(case: Case, path: Path) -> Mapping[str, Any]:
    """Write the transformer's configuration; weights are random, and made where they are used."""
    if case.release is None:
        write_tiny(path)
        config: Mapping[str, Any] = json.loads((path / "transformer/config.json").read_text())
        return config
    config = release(case.release).transformer
    (path / "transformer").mkdir(parents=True)
    (path / "transformer/config.json").write_text(json.dumps(dict(config)))
    return config


def make_random(model: nn.Module) -> None:
    """Small numbers of both signs in every parameter; norms stay near one."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(mean=1.0 if "norm" in name and parameter.ndim == 1 else 0.0, std=0.02)


class Synthetic:
    """Samples in host memory, drawn once."""

    def __init__(self, case: Case, config: Mapping[str, Any]) -> None:
        latent = (16, (case.num_frames - 1) // 4 + 1, case.height // 8, case.width // 8)
        generator = torch.Generator().manual_seed(0)
        self.shapes = [latent] * 8
        self.samples = self
        self._drawn = [
            Drawn(
                torch.randn(latent, generator=generator),
                torch.randn(latent, generator=generator),
                torch.rand((), generator=generator),
                Text(torch.randn(case.text_tokens, config["text_dim"], generator=generator)),
                {},
            )
            for _ in self.shapes
        ]

    def __len__(self) -> int:
        return len(self.shapes)

    def id(self, index: int) -> str:
        """Name of a sample."""
        return str(index)

    def training(self, place: Place) -> Drawn:
        """The sample at a place."""
        return self._drawn[place.index]


class Quiet:
    """Neither asked to stop nor watched."""

    def reason(self) -> str | None:
        """Nobody asks."""
        return None

    def honour(self) -> None:
        """Nothing was asked."""

    def beat(self, step: int, phase: str) -> None:
        """Nobody listens."""


class Windows:
    """Times a training in windows of some steps, the first of which does not count."""

    def __init__(self, case: Case, device: str) -> None:
        self._size, self._device = case.warmup, device
        self._ends: list[tuple[float, float]] = []

    def after(self, step: int) -> None:
        """Say that ``step``, counted from 1, is done."""
        if step % self._size == 0:
            if self._device == "cuda":
                torch.cuda.synchronize()
            self._ends.append((time.perf_counter(), time.process_time()))

    def medians(self) -> tuple[float, float]:
        """Of a step: seconds on the wall, and seconds of the host's cores."""
        wall, host = (
            statistics.median((b - a) / self._size for a, b in itertools.pairwise(clock))
            for clock in zip(*self._ends, strict=True)
        )
        return wall, host


def our_steps(case: Case, recipe: Recipe, config: Mapping[str, Any], windows: Windows) -> None:
    """The training loop, with all that it does beside computing."""
    team = Team(Process(Quiet(), Quiet()), Layout(1, 1, 1, ""), recipe.train.device)
    path = Path(recipe.model.path)
    saved = worker.empty_state(recipe, path, transformer="transformer", team=team)
    make_random(saved.model)
    runner = Runner(saved.model, team, recipe.parallel)
    source: Any = Synthetic(case, config)
    directory = RunDir(recipe.run_dir).training()
    losses = worker.losses_of(find_family(recipe), runner)
    method = build_method(recipe.train)
    job = loop.Job(recipe.train, directory, team, saved, runner, losses, source, source, method)
    start = loop.Progressed(step=0, losses=(), measured=True, watch=None)
    with contextlib.ExitStack() as stack:
        running = loop.Loop(job, start, worker.work_of(recipe, config, team), {}, stack)
        for step in range(1, recipe.train.steps + 1):
            running.one_step(step)
            running.record(step)
            windows.after(step)


def plain_steps(case: Case, recipe: Recipe, config: Mapping[str, Any], windows: Windows) -> None:
    """A plain loop over diffusers' own forward."""
    from diffusers import WanTransformer3DModel

    device = recipe.train.device
    model: Any = WanTransformer3DModel.from_config(dict(config)).to(device)
    make_random(model)
    model.train()
    if case.recompute != "none":
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    source = Synthetic(case, config)
    family = find_family(recipe)
    for step in range(case.warmup + case.steps):
        places = [Place(0, (step * case.batch + i) % len(source)) for i in range(case.batch)]
        batch = collate([source.training(place) for place in places], device=device)
        dtype = getattr(torch, case.dtype)
        with torch.autocast(device, dtype=dtype, enabled=case.dtype != "float32"):
            prediction: Tensor = model(**family.arguments(batch), return_dict=False)[0]
        loss = flow.loss_per_sample(prediction, batch.latents, batch.noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        windows.after(step + 1)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    import diffusers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
