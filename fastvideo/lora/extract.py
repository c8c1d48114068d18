# SPDX-License-Identifier: Apache-2.0
"""What a finetune changed as a LoRA: the largest singular values of tuned minus base.

Axes: O outputs, I inputs, X the lesser of both, R rank.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvideo import __version__
from fastvideo.cost.layers import Tokens
from fastvideo.cost.transformer import layers
from fastvideo.errors import UserError
from fastvideo.export_folder import refuse_existing, replacing_folder
from fastvideo.log import Progress, logger
from fastvideo.lora.places import ModelFolder, model_folder, naming
from fastvideo.models.family import pick_device
from fastvideo.models.folder import read_config, without_traces
from fastvideo.models.lora_file import Adapter, write_lora
from fastvideo.models.lora_pair import Pair
from fastvideo.models.weights import WeightFiles
from fastvideo.state import LORA_FILES

SMALLEST = 1e-32
"""Squared singular values below this, by the largest, are rounding: nothing is divided by them."""

SLACK = 4 * torch.finfo(torch.float64).eps
"""A share less than asked for by no more is as much."""


@dataclass(frozen=True)
class Extraction:
    """How to extract; one of ``rank`` and ``energy`` is given."""

    rank: int | None = None
    """Of each projection, or all it has if that is less."""
    energy: float | None = None
    """The least rank that keeps this share of the squared change of each projection."""
    biases: bool = False
    """Keep what changed in the biases of projections."""
    device: str = "auto"
    """Where singular values are computed."""


@dataclass
class _Kept:
    """What became of the change of a transformer; sums are of squared numbers."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    of_projections: float = 0.0
    kept: float = 0.0


def extract(base: str, tuned: str, out: Path, *, how: Extraction) -> dict[str, Any]:
    """Write a LoRA of each transformer that differs: ``W_tuned - W_base``, as near as ranks allow.

    Tensors are read one by one. What no LoRA can hold (norms, tables, and biases if they are not
    asked for) is told.

    Args:
        base: Folder of the model that was finetuned, or its id on the Hub.
        tuned: Folder of the result.
        out: The folder to write, which must not exist.
        how: Rank and what else.

    Returns:
        ``{"path": folder, "transformers": {name: report}}``; a report has ``modules``, ``rank`` of
        most, ``kept``, the share of the squared change of the projections' weights, and biases if
        they are asked for, ``kept_of_all``, that of all tensors', ``worst``, the module of which
        least was kept, and ``left_out``, the tensors that are not in the LoRA with the norm of
        their change.

    Raises:
        UserError: The models are of different architectures or equal, or ``out`` exists, be
            it that it came in the meantime.
    """
    refuse_existing(out)
    one, other = model_folder(base, option="--base"), model_folder(tuned, option="--tuned")
    for name in one.transformers:
        _check_pair(one, other, name)
    device = pick_device(how.device)
    reports = {}
    with replacing_folder(out, point="lora") as temporary:
        for name in one.transformers:
            kept = _extract(one, other, name, how=how, device=device)
            if kept.pairs:
                reports[name] = _report(name, kept)
                about = {key: reports[name][key] for key in ("kept", "kept_of_all")}
                text = json.dumps({"lora extract": {"version": __version__, **about}})
                adapter = Adapter.of(kept.pairs)
                write_lora(temporary / LORA_FILES[name], adapter, about={"fastvideo": text})
        if not reports:
            raise UserError(f"--tuned {tuned}: its projections are those of --base; nothing to do")
    logger.info("wrote LoRA files of %s to %s", " and ".join(reports), out)
    return {"path": str(out), "transformers": reports}


def _check_pair(base: ModelFolder, tuned: ModelFolder, name: str) -> None:
    if base.family != tuned.family:
        raise UserError(
            f"--tuned {tuned.path}: is a {tuned.family} model, --base {base.path} is {base.family}"
        )
    configs = []
    for model, option in ((base, "--base"), (tuned, "--tuned")):
        with naming(option):
            configs.append(without_traces(read_config(model.path, f"{name}/config.json")))
    if configs[0] != configs[1]:
        keys = sorted(
            k for k in {**configs[0], **configs[1]} if configs[0].get(k) != configs[1].get(k)
        )
        raise UserError(
            f"--tuned {tuned.path}: {name}/config.json differs from that of --base in "
            f"{', '.join(keys)}; give the model it was finetuned from"
        )


def _extract(
    base: ModelFolder, tuned: ModelFolder, name: str, *, how: Extraction, device: str
) -> _Kept:
    config = read_config(base.path, f"{name}/config.json")
    modules = {linear.name for linear in layers(config, base.family, Tokens(1, 1)).linears}
    kept, biases = _Kept(), {}
    for tensor, change in _changes(base, tuned, name):
        module, _, kind = tensor.rpartition(".")
        squares = float(change.double().square().sum())
        if module in modules and kind == "weight":
            pair, share = decompose(change, how=how, device=device)
            kept.pairs[module], kept.shares[module] = pair, share
            kept.of_projections += squares
            kept.kept += share * squares
        elif module in modules and how.biases:
            biases[module] = change
            kept.of_projections += squares
            kept.kept += squares
        else:
            kept.left_out[tensor] = squares
    for module, change in biases.items():
        pair = kept.pairs.get(module) or _no_change(base, name, module)
        kept.pairs[module] = Pair(pair.down, pair.up, pair.alpha, change / pair.scale)
    return kept


def _changes(base: ModelFolder, tuned: ModelFolder, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors that differ, tuned minus base, in float32."""
    with naming("--base"):
        before = WeightFiles(base.path, folder=name)
    with naming("--tuned"):
        after = WeightFiles(tuned.path, folder=name)
    if others := before.tensors.keys() ^ after.tensors.keys():
        raise UserError(f"{tuned.path}: --base and --tuned have not both {name}: {min(others)}")
    progress = Progress("tensors", total=len(before.tensors))
    for tensor, stored in before.tensors.items():
        if after.tensors[tensor].shape != stored.shape:
            raise UserError(f"{tuned.path}: {tensor} of {name} has another shape than in --base")
        change = after.read(tensor).float() - before.read(tensor).float()
        if not bool(change.isfinite().all()):
            raise UserError(f"{tuned.path}: {tensor} of {name} is not finite, or in --base")
        if bool(change.any()):
            yield tensor, change
        progress.advance(tensor)
    progress.close()


def decompose(change: Tensor, *, how: Extraction, device: str = "cpu") -> tuple[Pair, float]:
    """The nearest matrices of the wanted rank (Eckart and Young, 1936), and the share they keep.

    Args:
        change: (O, I); of a convolution (O, channels, ...). Float32, not zero.
        how: Rank.
        device: Where it is computed.

    Returns:
        A pair on the host with scale 1, the singular values shared by both matrices; and the share
        of the squared change.
    """
    change_OI = change.flatten(1).to(device).double()
    tall = change_OI.shape[0] > change_OI.shape[1]
    # The smaller Gram matrix has the singular vectors of its side, to float64 and thus to float32
    # of the change, and takes a fraction of the time of the whole decomposition.
    square = change_OI.T @ change_OI if tall else change_OI @ change_OI.T
    squares_R, vectors_XR = (part.flip(-1) for part in torch.linalg.eigh(square))
    # Of a change of low rank the rest is rounding of the decomposition, up to so much.
    rounding = squares_R[0] * len(squares_R) * torch.finfo(squares_R.dtype).eps
    sums_R = squares_R.where(squares_R > rounding, 0).cumsum(0)
    energy_R = sums_R / sums_R[-1]
    rank = _rank(energy_R, how)
    basis_XR = vectors_XR[:, :rank]
    root_R = squares_R[:rank].clamp_min(squares_R[0] * SMALLEST).pow(0.25)
    if tall:
        down_RI, up_OR = (basis_XR * root_R).T, change_OI @ basis_XR / root_R
    else:
        down_RI, up_OR = (basis_XR.T @ change_OI) / root_R[:, None], basis_XR * root_R
    down, up = (part.float().cpu().contiguous() for part in (down_RI, up_OR))
    down = down.reshape(rank, *change.shape[1:])
    up = up.reshape(*up.shape, *(1 for _ in change.shape[2:]))
    return Pair(down, up, float(rank)), float(energy_R[rank - 1])


def _rank(energy_R: Tensor, how: Extraction) -> int:
    if how.rank is not None:
        return min(how.rank, len(energy_R))
    assert how.energy is not None
    enough = (energy_R >= how.energy - SLACK).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(energy_R)


def _no_change(base: ModelFolder, name: str, module: str) -> Pair:
    """Of a projection of which the bias alone changed."""
    outputs, *inputs = WeightFiles(base.path, folder=name).tensors[f"{module}.weight"].shape
    return Pair(torch.zeros(1, *inputs), torch.zeros(outputs, 1, *(1 for _ in inputs[1:])), 1.0)


def _report(name: str, kept: _Kept) -> dict[str, Any]:
    left_out = sum(kept.left_out.values())
    everything = kept.of_projections + left_out
    share = kept.kept / kept.of_projections if kept.of_projections else 1.0
    rank = Adapter.of(kept.pairs).rank
    logger.info(
        "%s: %d adapters, rank %d of most, keep %.2f%% of their squared change",
        name,
        len(kept.pairs),
        rank,
        100 * share,
    )
    if kept.left_out:
        _warn(name, kept.left_out, share=left_out / everything)
    return {
        "modules": len(kept.pairs),
        "rank": rank,
        "kept": share,
        "kept_of_all": kept.kept / everything if everything else 1.0,
        "worst": min(kept.shares, key=lambda module: kept.shares[module], default=None),
        "left_out": {tensor: squares**0.5 for tensor, squares in kept.left_out.items()},
    }


def _warn(name: str, left_out: Mapping[str, float], *, share: float) -> None:
    largest = sorted(left_out, key=lambda tensor: -left_out[tensor])[:3]
    logger.warning(
        "%s: %d tensors changed that are no matrices of projections and are not in the LoRA, "
        "%.2f%% of the squared change; most in %s",
        name,
        len(left_out),
        100 * share,
        ", ".join(largest),
    )
