# SPDX-License-Identifier: Apache-2.0
"""Our fused norms against torch, eager and compiled, and against apex, Liger and quack.

    python benchmarks/bench_norm.py                         # CPU, one thread
    python benchmarks/bench_norm.py --device cuda
    python benchmarks/bench_norm.py --json benchmarks/results/NAME.json

Eager is what diffusers' Wan does, and compiled is the same through torch.compile; libraries that
are installed take part where they have the operation. All run in one process and take turns on the
same inputs. On the CPU the minimum of process time is compared, on a GPU the median of CUDA events
over inputs that rotate, so that none is in a cache. The share of the copy's bandwidth is of
the least traffic the operation can do with, tokens only.
"""

import argparse
import ctypes
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

from fastvideo.ops import library, norm

EPS = 1e-6
HEAD = 128
CPU_SIZES = ((8192, 1536), (4096, 5120))
GPU_SIZES = ((32760, 1536), (32760, 3072), (32760, 5120))
DTYPES = (torch.float32, torch.bfloat16)
ROTATING = 3

Function = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """Functions that compute the same from the same inputs."""

    name: str
    eager: Function
    ours: Function
    inputs: Callable[[int, int, torch.dtype, str], list[Tensor]]
    passes: tuple[int, int]
    """Reads and writes of all tokens that a forward and a backward cannot do without."""
    libraries: tuple[tuple[str, str, Callable[[Any], Function]], ...] = ()
    """Name of each, the module to import and what to make of that."""


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Norm and modulation of diffusers' WanTransformerBlock."""
    normed = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), None, None, EPS)
    return (normed * (1 + scale) + shift).type_as(x)


def gated_modulated(
    residual: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual, norm and modulation of diffusers' WanTransformerBlock."""
    total = (residual.float() + y * gate).type_as(residual)
    return total, modulated(total, scale, shift)


def rms_rotary(x_BSHK: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm across heads and rotation of diffusers' WanAttnProcessor."""
    normed = torch.nn.functional.rms_norm(x_BSHK.flatten(2), weight.shape, None, EPS)
    x1, x2 = (normed * weight).unflatten(2, x_BSHK.shape[2:]).unflatten(3, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
    return out.flatten(3).type_as(x_BSHK)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm of torch."""
    return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, EPS)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm of torch."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
    """Random numbers that have a gradient."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def modulated_inputs(s: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tokens, scale, shift."""
    vectors = [draw(1, 1, d, device=device) for _ in range(2)]
    return [draw(1, s, d, dtype=dtype, device=device), *vectors]


def gated_inputs(s: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Residual, what is added, gate, scale, shift."""
    tokens = [draw(1, s, d, dtype=dtype, device=device) for _ in range(2)]
    return [*tokens, *(draw(1, 1, d, device=device) for _ in range(3))]


def rotary_inputs(s: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Heads, weight, cos, sin."""
    angles = torch.randn(s, HEAD // 2, device=device)
    heads = draw(1, s, d // HEAD, HEAD, dtype=dtype, device=device)
    return [heads, draw(d, device=device), angles.cos(), angles.sin()]


def affine_inputs(s: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tokens, weight, bias; all of one dtype, as every library takes them."""
    vectors = [draw(d, dtype=dtype, device=device) for _ in range(2)]
    return [draw(1, s, d, dtype=dtype, device=device), *vectors]


def rms_inputs(s: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tokens, weight."""
    return affine_inputs(s, d, dtype, device)[:2]


VIDEO = (
    Operation(
        "layer norm, modulation",
        modulated,
        lambda x, scale, shift: norm.layer_norm(x, scale=scale, shift=shift, eps=EPS),
        modulated_inputs,
        (2, 3),
    ),
    Operation(
        "gated residual, layer norm, modulation",
        gated_modulated,
        lambda residual, y, gate, scale, shift: norm.residual_gate_layer_norm(
            residual, y, gate, scale=scale, shift=shift, eps=EPS
        ),
        gated_inputs,
        (4, 6),
    ),
    Operation(
        "RMS norm across heads, rotary",
        rms_rotary,
        lambda x, weight, cos, sin: norm.rms_norm_rotary(x, weight, cos, sin, EPS, True),
        rotary_inputs,
        (2, 3),
    ),
)
# What other libraries have, too; their kernels are for GPUs.
PLAIN = (
    Operation(
        "layer norm",
        affine,
        lambda x, weight, bias: norm.layer_norm(x, weight=weight, bias=bias, eps=EPS),
        affine_inputs,
        (2, 3),
        (
            (
                "apex",
                "apex.normalization",
                lambda module: (
                    lambda x, weight, bias: module.fused_layer_norm_affine(
                        x, weight, bias, weight.shape, EPS
                    )
                ),
            ),
            (
                "Liger",
                "liger_kernel.ops.layer_norm",
                lambda module: (
                    lambda x, weight, bias: module.LigerLayerNormFunction.apply(
                        x, weight, bias, EPS
                    )
                ),
            ),
        ),
    ),
    Operation(
        "RMS norm",
        rms,
        lambda x, weight: norm.rms_norm(x, weight, EPS),
        rms_inputs,
        (2, 3),
        (
            (
                "apex",
                "apex.normalization",
                lambda module: (
                    lambda x, weight: module.fused_rms_norm_affine(x, weight, weight.shape, EPS)
                ),
            ),
            (
                "Liger",
                "liger_kernel.ops.rms_norm",
                # In place would overwrite the gradient that the others still need.
                lambda module: (
                    lambda x, weight: module.LigerRMSNormFunction.apply(
                        x, weight, EPS, 0.0, "llama", False
                    )
                ),
            ),
            (
                "quack",
                "quack.rmsnorm",
                lambda module: lambda x, weight: module.rmsnorm(x, weight, eps=EPS),
            ),
        ),
    ),
)


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    device: str = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()
    functorch.donated_buffer = False  # a backward is run many times over one forward
    operations = VIDEO if device == "cpu" else (*VIDEO, *PLAIN)
    sizes = CPU_SIZES if device == "cpu" else GPU_SIZES
    cases = [
        compare(operation, size, dtype, device, arguments.rounds)
        for size in sizes
        for dtype in DTYPES
        for operation in operations
    ]
    if arguments.json:
        figures = {"machine": machine(device), "rounds": arguments.rounds, "cases": cases}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def keep_freed_memory() -> None:
    """Have malloc reuse large blocks: to map fresh pages costs more than a norm."""
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    for parameter in (mmap_threshold, trim_threshold):
        if libc.mallopt(parameter, 2**31 - 1) != 1:
            raise OSError("mallopt refused a threshold")


def compare(
    operation: Operation, size: tuple[int, int], dtype: torch.dtype, device: str, rounds: int
) -> dict[str, Any]:
    """Time the variants of an operation in turns; milliseconds, printed as they come."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    sets = [
        operation.inputs(*size, dtype, device) for _ in range(ROTATING if device == "cuda" else 1)
    ]
    tokens = [inputs[0].detach() for inputs in sets]
    target = torch.empty_like(tokens[0])
    forwards: dict[str, Function] = {"copy": lambda i: target.copy_(tokens[i])}
    backwards: dict[str, Function] = {}
    for name, function in variants_of(operation).items():
        forwards[name] = forward_of(function, sets)
        backwards[name] = backward_of(function, sets)
    time_all = time_on_cpu if device == "cpu" else time_on_gpu
    forward, backward = time_all(forwards, rounds), time_all(backwards, rounds)
    copy = forward.pop("copy")
    num_bytes = 2 * target.numel() * target.element_size()
    print(
        f"{operation.name}, {size[0]} x {size[1]}, {str(dtype).removeprefix('torch.')}: "
        f"copy {copy:.2f} ms, {num_bytes / copy / 1e6:.1f} GB/s"
    )
    for name in forward:
        words = [f"  {name:<12}"]
        for found, passes in zip((forward, backward), operation.passes, strict=True):
            share = copy * passes / 2 / found[name]
            words.append(
                f"{found[name]:9.3f} ms {found[name] / found['fastvideo']:6.2f} x {share:6.1%} "
                "of copy"
            )
        print("  ".join(words), flush=True)
    return {
        "operation": operation.name,
        "tokens": size[0],
        "channels": size[1],
        "dtype": str(dtype).removeprefix("torch."),
        "passes": operation.passes,
        "copy_ms": copy,
        "forward_ms": forward,
        "backward_ms": backward,
    }


def variants_of(operation: Operation) -> dict[str, Function]:
    """Ours, torch's, and those of the libraries that are installed."""
    variants = {
        "fastvideo": operation.ours,
        "eager": operation.eager,
        "compiled": torch.compile(operation.eager, dynamic=False),
    }
    for name, module, build in operation.libraries:
        try:
            variants[name] = build(importlib.import_module(module))
        except ImportError as error:
            print(f"  {name} does not take part: {error}")
    return variants


def forward_of(function: Function, sets: list[list[Tensor]]) -> Function:
    """A forward of the inputs of one turn, with all that a backward would need."""

    def run(turn: int) -> None:
        function(*sets[turn])

    return run


def backward_of(function: Function, sets: list[list[Tensor]]) -> Function:
    """A backward of the inputs of one turn."""
    graphs = []
    for inputs in sets:
        outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        graphs.append((outputs, leaves, [torch.randn_like(output) for output in outputs]))

    def run(turn: int) -> None:
        outputs, leaves, grads = graphs[turn]
        torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return run


def time_on_cpu(functions: dict[str, Function], rounds: int) -> dict[str, float]:
    """Least process time of each, in milliseconds."""
    for function in functions.values():
        function(0)
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function(0)
            found[name] = min(found[name], (time.process_time() - start) * 1e3)
    return found


def time_on_gpu(functions: dict[str, Function], rounds: int) -> dict[str, float]:
    """Median time of each between CUDA events, in milliseconds."""
    for function in functions.values():
        for turn in range(ROTATING):
            function(turn)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    for i in range(rounds):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host must be ahead, or launches would be timed: the GPU is given a rest.
            torch.cuda._sleep(1_000_000)
            start.record()
            function(i % ROTATING)
            end.record()
            events.setdefault(name, []).append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs)
        for name, pairs in events.items()
    }


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_isa": library.cpu_isa(),
        "cpu_threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
