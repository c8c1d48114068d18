# SPDX-License-Identifier: Apache-2.0
"""``fastvideo check``: what is installed here, which kernels a call takes, whether they compute.

It needs no recipe and runs where torch is missing, so that images, job prologues and bug reports
can ask before anything else is started.
"""

import argparse
import math
import platform
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastvideo import __version__
from fastvideo.errors import Failed, UserError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "pyarrow",
    "av",
    "submitit",
    "torchao",
    "apex",
)
OLDEST_CAPABILITY = (8, 0)
LARGEST_ERROR = {"cpu": 1e-5, "cuda": 1e-2}
"""Of the self-test, relative to the reference: float32 on the CPU, bfloat16 on GPUs."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of ``fastvideo check``."""
    made = argparse.ArgumentParser(
        prog="fastvideo check",
        description="Say what is installed here, which kernels a call takes and whether they work.",
    )
    made.add_argument("verb", choices=("check",), help=argparse.SUPPRESS)
    made.add_argument(
        "--require",
        metavar="PART[,PART]",
        type=_parts,
        default=[],
        help=f"end with exit code 1 if one of these is missing: {', '.join(REQUIREMENTS)}",
    )
    made.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    return made


def check(required: list[str]) -> dict[str, Any]:
    """Look at this machine; ``missing`` holds a sentence for each required part that is not here.

    Args:
        required: Of `REQUIREMENTS`.

    Returns:
        Plain values: ``versions``, ``kernels``, ``devices``, ``missing``.
    """
    found = {"versions": versions(), "kernels": kernels(), "devices": devices()}
    lacks = [sentence for part in required if (sentence := REQUIREMENTS[part](found))]
    return {**found, "missing": lacks}


def ensure(found: dict[str, Any]) -> None:
    """Raise `Failed` with what is missing, if anything is."""
    if found["missing"]:
        raise Failed("; ".join(found["missing"]))


def versions() -> dict[str, str | None]:
    """Return versions of ourselves, Python and the packages that matter; None if not installed."""
    known: dict[str, str | None] = {"fastvideo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = None
    return known


def kernels() -> dict[str, Any]:
    """Return the library, how it was built, what a call takes, and the errors of a self-test."""
    try:
        from fastvideo import ops
        from fastvideo.ops import library

        build, isa, backends = library.build(), library.cpu_isa(), ops.backends()
    except ModuleNotFoundError as error:
        return {"problem": f"{error.name} is not installed, which kernels need"}
    except (ImportError, OSError) as error:  # of torch, say for want of a CUDA library
        return {"problem": f"torch cannot be imported: {error}"}
    except UserError as error:
        return {"problem": str(error)}
    return {
        "problem": None,
        "library": str(library.PATH),
        "build": vars(build),
        "cpu_isa": isa,
        "backends": backends,
        "errors": {device: self_test(device) for device in _test_devices(build.cuda is not None)},
    }


def _test_devices(has_cuda_kernels: bool) -> list[str]:
    import torch

    count = torch.cuda.device_count() if has_cuda_kernels else 0
    return ["cpu", *(f"cuda:{number}" for number in range(count))]


def self_test(device: str) -> dict[str, float | str]:
    """Run attention and norms, forward and backward, and compare them with their references.

    Returns:
        For each, the largest relative error of outputs and gradients, or what was raised.
    """
    import torch

    cases = {"vsa": _attention_error, "norm": _norm_error}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    results: dict[str, float | str] = {}
    for name, case in cases.items():
        try:
            error = case(device, dtype)
            results[name] = error if math.isfinite(error) else "the result is not finite"
        except RuntimeError as error:  # whatever CUDA or a kernel has to say
            results[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return results


def _attention_error(device: str, dtype: "torch.dtype") -> float:
    import torch

    from fastvideo import ops

    generator = torch.Generator().manual_seed(0)
    tiles = ops.Tiles.from_geometry(5, 6, 9, device=device)
    tokens = [
        torch.randn(1, 2, tiles.num_tokens, 64, generator=generator).to(device, dtype)
        for _ in range(4)
    ]
    index = ops.selected_tiles(tokens[0], tokens[1], tiles=tiles, topk=3)
    return _largest_error(
        lambda q, k, v, gate: ops.ragged_sparse_attn(q, k, v, gate, tiles=tiles, topk=3),
        lambda q, k, v, gate: ops.ragged_sparse_attn_reference(
            q, k, v, gate, tiles=tiles, topk=3, index=index
        ),
        tokens,
    )


def _norm_error(device: str, dtype: "torch.dtype") -> float:
    import torch

    from fastvideo import ops

    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, (scale, shift) = numbers(1, 64, 1536).to(dtype), (numbers(1, 1, 1536) for _ in range(2))
    heads, weight, angles = numbers(1, 64, 12, 128).to(dtype), numbers(1536), numbers(64, 64)
    cos, sin = angles.cos(), angles.sin()
    modulated = _largest_error(
        lambda x, scale, shift: ops.layer_norm(x, scale=scale, shift=shift, eps=1e-6),
        lambda x, scale, shift: ops.layer_norm_reference(x, scale=scale, shift=shift, eps=1e-6),
        [x, scale, shift],
    )
    rotated = _largest_error(
        lambda x, weight: ops.rms_norm_rotary(x, weight, cos, sin, 1e-6, True),
        lambda x, weight: ops.rms_norm_rotary_reference(
            x, weight, cos.double(), sin.double(), 1e-6, True
        ),
        [heads, weight],
    )
    return max(modulated, rotated)


def _largest_error(
    function: Callable[..., "torch.Tensor"],
    reference: Callable[..., "torch.Tensor"],
    inputs: "list[torch.Tensor]",
) -> float:
    """Compare output and gradients with those of float64, relative to their norms."""
    import torch

    results = []
    for call, dtype in ((function, None), (reference, torch.float64)):
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        results.append([out.detach(), *grads])
    return max(
        float((found.double() - expected).norm() / expected.norm())
        for found, expected in zip(*results, strict=True)
    )


def devices() -> list[dict[str, Any]]:
    """Return the CUDA devices that torch finds."""
    try:
        import torch
    except ModuleNotFoundError:
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _lacks_kernels(found: dict[str, Any]) -> str | None:
    told = found["kernels"]
    if told["problem"]:
        return f"kernels: {told['problem']}"
    if found["devices"] and told["build"]["cuda"] is None:
        return (
            f"kernels: there is a GPU, but the library has no CUDA kernels "
            f"({told['build']['why_no_cuda']}); build it with FASTVIDEO_BUILD=cuda"
        )
    for device, errors in told["errors"].items():
        largest = LARGEST_ERROR[device.partition(":")[0]]
        for name, error in errors.items():
            if isinstance(error, str):
                return f"kernels: {name} on {device}: {error}"
            if error > largest:
                return f"kernels: {name} on {device} is {error:.1e} off its reference"
    return None


def _lacks_gpu(found: dict[str, Any]) -> str | None:
    if not found["devices"]:
        version = found["versions"]["torch"]
        return f"gpu: torch {version} finds no CUDA device; is it a CUDA build, is there a driver?"
    for device in found["devices"]:
        if tuple(map(int, device["capability"].split("."))) < OLDEST_CAPABILITY:
            return (
                f"gpu: {device['name']} has capability {device['capability']}, kernels need "
                "8.0 or newer"
            )
    return None


REQUIREMENTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "kernels": _lacks_kernels,
    "gpu": _lacks_gpu,
}


def _parts(text: str) -> list[str]:
    parts = [part for part in text.split(",") if part]
    for part in parts:
        if part not in REQUIREMENTS:
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(REQUIREMENTS)}")
    return parts


def describe(found: dict[str, Any]) -> str:
    """Return what `check` found as lines for a person."""
    lines = [
        f"{name:<13} {version or 'not installed'}" for name, version in found["versions"].items()
    ]
    lines += ["", *_describe_kernels(found["kernels"]), ""]
    for number, device in enumerate(found["devices"]):
        lines.append(
            f"cuda:{number:<8} {device['name']}, capability {device['capability']}, "
            f"{device['memory_gib']} GiB"
        )
    if not found["devices"]:
        lines.append("GPUs          none that torch can use")
    return "\n".join(lines)


def _describe_kernels(told: dict[str, Any]) -> list[str]:
    if told["problem"]:
        return [f"kernels       none: {told['problem']}"]
    build = told["build"]
    cuda = (
        f"CUDA {build['cuda']} for {', '.join(build['cuda_archs'])}"
        if build["cuda"]
        else f"no CUDA kernels ({build['why_no_cuda']})"
    )
    lines = [
        f"kernels       {told['library']}",
        f"  built       for {', '.join(build['cpu'])}; {cuda}; "
        f"torch {build['oldest_torch']} and newer",
    ]
    for family, paths in told["backends"].items():
        taken = ", ".join(f"{device}: {path}" for device, path in paths.items())
        lines.append(f"  {family:<11} {taken}")
    for device, errors in told["errors"].items():
        told_errors = ", ".join(
            f"{name} {error if isinstance(error, str) else format(error, '.1e')}"
            for name, error in errors.items()
        )
        lines.append(f"  self-test   {device}: relative error of {told_errors}")
    return lines
