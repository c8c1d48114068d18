# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention against dense attention and FlexAttention with the same mask, in one run.

    python benchmarks/bench_vsa.py                        # CPU, one thread, 4k to 16k tokens
    python benchmarks/bench_vsa.py --device cuda          # 8k to 77k tokens, both kinds of kernels
    python benchmarks/bench_vsa.py --json benchmarks/results/NAME.json

`whole` is all of it: means, coarse attention, selection, fine attention, gate. `fine` is attention
to the selected tiles alone, which is what FlexAttention, compiled and with a block mask of the same
tiles, computes too; it has no backward pass on the CPU. `dense` is torch's
scaled_dot_product_attention. `fastvideo-kernel` is upstream's package, where it is installed.
Variants take turns. On the CPU the shortest of CPU times counts, on CUDA the median by events.
TFLOP/s are those of the fine products, 4 B H D for each pair of tokens, 2.5 times as many backward.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fastvideo.ops import VSA_TILE_SIZE, Tiles, num_selected, ragged_sparse_attn, selected_tiles
from fastvideo.ops.library import build, cpu_isa, operators

TILE = 64


@dataclass(frozen=True)
class Case:
    """Attention of a video's tokens; (T,H,W) are tokens, whole tiles of (4,4,4) along each axis."""

    video: tuple[int, int, int]
    heads: int
    channels: int
    dtype: str
    sparsity: float

    @property
    def tokens(self) -> int:
        """S."""
        return self.video[0] * self.video[1] * self.video[2]

    @property
    def selected(self) -> int:
        """Key tiles for each query tile."""
        return num_selected(self.sparsity, self.tokens // TILE)

    @property
    def flops(self) -> float:
        """Of the fine stage's forward pass."""
        return 4.0 * self.heads * self.channels * self.tokens * self.selected * TILE


SPARSITIES = (0.9, 0.95, 0.8, 0.0)
# torch's dense attention in bfloat16 takes many seconds a pass on CPUs: one case of it.
CPU_CASES = (
    Case((8, 32, 32), 1, 128, "float32", 0.9),
    Case((8, 32, 32), 1, 128, "bfloat16", 0.9),
    *(Case((8, 32, 32), 1, 128, "float32", sparsity) for sparsity in SPARSITIES[1:]),
    Case((4, 32, 32), 1, 128, "float32", 0.9),
    Case((16, 32, 32), 1, 128, "float32", 0.9),
)
GPU_CASES = tuple(
    Case(video, 12, 128, "bfloat16", sparsity)
    for video in ((8, 32, 32), (20, 32, 52), (40, 32, 32), (24, 40, 80))
    for sparsity in SPARSITIES
)

Call = Callable[[], Any]


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="turns of each variant; 5 on the CPU, else 20")
    parser.add_argument("--cases", type=int, help="only so many, the most important first")
    parser.add_argument("--name", default="", help="what to call the machine in the results")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    cases = CPU_CASES if arguments.device == "cpu" else GPU_CASES
    rounds = arguments.rounds or (5 if arguments.device == "cpu" else 20)
    results = [compare(case, arguments.device, rounds) for case in cases[: arguments.cases]]
    if arguments.json:
        figures = {"machine": machine(arguments.device, arguments.name), "cases": results}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def compare(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Time all variants of a case in turns, forward alone and with the backward pass."""
    print(f"{case.tokens} tokens, {case.heads} heads, {case.dtype}, sparsity {case.sparsity}")
    result: dict[str, Any] = {"case": asdict(case) | {"tokens": case.tokens}, "rounds": rounds}
    variants = forwards(case, device)
    for direction in ("forward", "forward and backward"):
        calls = variants
        if direction != "forward":
            calls = {
                name: with_backward(call)
                for name, call in variants.items()
                if device == "cuda" or name != "flex"
            }
        with torch.set_grad_enabled(direction != "forward"):
            seconds = in_turns(calls, device, rounds)
        flops = case.flops * (1.0 if direction == "forward" else 3.5)
        result[direction] = {
            name: {"ms": s * 1e3, "tflops": flops / s / 1e12} for name, s in seconds.items()
        }
        print(f"  {direction}")
        for name, s in seconds.items():
            print(
                f"    {name:<20}{s * 1e3:10.2f} ms  dense / it {seconds['dense'] / s:6.2f}  "
                f"{flops / s / 1e12:9.3f} TFLOP/s",
                flush=True,
            )
    return result


def forwards(case: Case, device: str) -> dict[str, Call]:
    """The forward pass of each variant; each returns its output and what it has gradients for."""
    dtype = getattr(torch, case.dtype)
    tiles = Tiles.from_geometry(*case.video, device=device)
    torch.manual_seed(0)

    def tokens() -> Tensor:
        shape = (1, case.tokens, case.heads, case.channels)
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    leaves = q, k, v, gate = [tokens() for _ in range(4)]
    q, k, v, gate = (leaf.transpose(1, 2) for leaf in leaves)
    index = selected_tiles(q, k, tiles=tiles, topk=case.selected)
    attend = torch.compile(flex_attention, dynamic=False)
    mask = block_mask(index)
    calls: dict[str, Call] = {}
    for kernel in ("",) if device == "cpu" else kernels():
        with_kernel = using(kernel)
        calls[f"whole {kernel}".strip()] = with_kernel(
            lambda: (ragged_sparse_attn(q, k, v, gate, tiles=tiles, topk=case.selected), leaves)
        )
        calls[f"fine {kernel}".strip()] = with_kernel(
            lambda: (fine(q, k, v, index, tiles), leaves[:3])
        )
    # On the CPU FlexAttention refuses tensors that need gradients.
    flexible = (q, k, v) if device == "cuda" else (q.detach(), k.detach(), v.detach())
    calls["flex"] = lambda: (attend(*flexible, block_mask=mask), leaves[:3])
    calls["dense"] = lambda: (scaled_dot_product_attention(q, k, v), leaves[:3])
    if device == "cuda" and importlib.util.find_spec("fastvideo_kernel"):
        calls["fastvideo-kernel"] = lambda: (upstream(q, k, v, gate, case), leaves)
    return calls


def fine(q: Tensor, k: Tensor, v: Tensor, index: Tensor, tiles: Tiles) -> Tensor:
    """Attention to the tiles in ``index`` alone."""
    table = tiles.table
    out: Tensor = operators().vsa_fine_forward(q, k, v, index, None, table, table, None, None)[0]
    return out


def block_mask(index: Tensor) -> BlockMask:
    """What FlexAttention needs to attend to the same tiles; all are full, none needs a mask."""
    counts = torch.full(index.shape[:3], index.shape[3], dtype=torch.int32, device=index.device)
    num_tiles = index.shape[2]
    padded = torch.zeros((*index.shape[:3], num_tiles), dtype=torch.int32, device=index.device)
    padded[..., : index.shape[3]] = index
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(padded), counts, padded, BLOCK_SIZE=TILE
    )


def upstream(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, case: Case) -> Tensor:
    """FastVideo's own package; all tiles are full, so that nothing is padded for it."""
    video_sparse_attn = importlib.import_module("fastvideo_kernel").video_sparse_attn
    sizes = torch.full((case.tokens // TILE,), TILE, dtype=torch.int32, device=q.device)
    given = (x.contiguous() for x in (q, k, v))
    out: Tensor = video_sparse_attn(
        *given, sizes, sizes, case.selected, VSA_TILE_SIZE, gate.contiguous()
    )
    return out


def kernels() -> tuple[str, ...]:
    """The kinds of kernels that this GPU has."""
    has_wgmma = torch.cuda.get_device_capability() == (9, 0)
    return ("wgmma", "mma") if has_wgmma else ("mma",)


def using(kernel: str) -> Callable[[Call], Call]:
    """Have a call take one kind of kernels, forward and backward."""

    def decorate(call: Call) -> Call:
        def decorated() -> Any:
            if kernel:
                os.environ["FASTVIDEO_VSA_KERNEL"] = kernel
            return call()

        return decorated

    return decorate


def with_backward(call: Call) -> Call:
    """Both passes; the gradient of the output is random and made once."""
    grads: list[Tensor] = []

    def both() -> None:
        out, leaves = call()
        if not grads:
            grads.append(torch.randn_like(out))
        torch.autograd.grad(out, leaves, grads[0])

    return both


def in_turns(calls: dict[str, Call], device: str, rounds: int) -> dict[str, float]:
    """Seconds of each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # compiles, and fills memory pools
    for _ in range(rounds):
        for name, call in calls.items():
            with stopwatch(device, taken[name]):
                call()
    reduce = min if device == "cpu" else statistics.median
    return {name: reduce(times) for name, times in taken.items()}


@contextmanager
def stopwatch(device: str, times: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes: of this process's CPU, or of the GPU."""
    if device == "cpu":
        start = time.process_time()
        yield
        times.append(time.process_time() - start)
        return
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    yield
    end.record()
    end.synchronize()
    times.append(begin.elapsed_time(end) / 1e3)


def machine(device: str, name: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "name": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_isa": cpu_isa(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": asdict(build()),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
