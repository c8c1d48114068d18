# SPDX-License-Identifier: Apache-2.0
"""LoRA files of one transformer: diffusers' and ComfyUI's written, these and others read."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvideo import atomic
from fastvideo.cost.transformer import is_hunyuan
from fastvideo.errors import UserError
from fastvideo.log import logger
from fastvideo.models.aligned import write_tensors
from fastvideo.models.lora_header import RANKS, Header, Size, read_header
from fastvideo.models.lora_names import MLP_RATIO, SWAPPED, diffusers_names, own_name, split
from fastvideo.models.lora_pair import Pair, fuse, is_finite, swap_halves, unfuse

METADATA = "lora_adapter_metadata"
"""Entry of a file's metadata: JSON of PEFT's ``LoraConfig``, its keys with `PREFIX`."""
PREFIX = "transformer."
"""Before every name in diffusers' files, also where they go into ``transformer_2``."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one transformer.

    ``tensors`` has by the names of diffusers' modules ``<module>.lora_A.weight`` (rank, in),
    ``<module>.lora_B.weight`` (out, rank) and, where adapters have one, ``<module>.lora_B.bias``
    (out,); those of convolutions have their kernel's dimensions as well.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    """Of most modules; those of others are in their tensors."""
    alpha: float
    """Of most modules: the product is scaled by alpha / rank."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Of the others, by module."""

    @classmethod
    def of(cls, pairs: Mapping[str, Pair]) -> "Adapter":
        """Gather the adapters of projections, named as diffusers does."""
        tensors: dict[str, Tensor] = {}
        for module, pair in pairs.items():
            tensors[f"{module}.lora_A.weight"] = pair.down
            tensors[f"{module}.lora_B.weight"] = pair.up
            if pair.bias is not None:
                tensors[f"{module}.lora_B.bias"] = pair.bias
        rank, alpha = (
            Counter(values).most_common(1)[0][0]
            for values in ((p.rank for p in pairs.values()), (p.alpha for p in pairs.values()))
        )
        others = {module: pair.alpha for module, pair in pairs.items() if pair.alpha != alpha}
        return cls(tensors, int(rank), alpha, others)

    def pairs(self) -> dict[str, Pair]:
        """The adapter of each projection."""
        end = ".lora_A.weight"
        modules = [name.removesuffix(end) for name in self.tensors if name.endswith(end)]
        return {
            module: Pair(
                down=self.tensors[f"{module}.lora_A.weight"],
                up=self.tensors[f"{module}.lora_B.weight"],
                alpha=self.alpha_pattern.get(module, self.alpha),
                bias=self.tensors.get(f"{module}.lora_B.bias"),
            )
            for module in modules
        }

    def sizes(self) -> dict[str, Size]:
        """For ``lora_header.check_fits``."""
        return {
            module: Size(pair.rank, math.prod(pair.down.shape[1:]), len(pair.up))
            for module, pair in self.pairs().items()
        }


def write_lora(path: Path, adapter: Adapter, *, about: Mapping[str, str] | None = None) -> None:
    """Write the file that ``load_lora_weights`` of diffusers' pipelines reads, complete or not.

    The metadata has rank and alpha as PEFT wants them: without, diffusers takes alpha to be the
    rank.

    Args:
        path: The file.
        adapter: On the host.
        about: Further texts for the metadata.

    Raises:
        UserError: A number is not finite.
    """
    tensors, config = for_diffusers(adapter)
    metadata = {**(about or {}), METADATA: json.dumps(config, sort_keys=True)}
    _refuse_overflow(path, tensors)
    with atomic.replacing(path, point="lora") as temporary:
        write_tensors(temporary, tensors, metadata=metadata)


def for_diffusers(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata as ``load_lora_into_transformer`` of diffusers' pipelines takes them."""
    tensors = {PREFIX + name: tensor for name, tensor in _with_biases(adapter).items()}
    return tensors, _peft_config(adapter)


def write_comfyui(
    path: Path, adapter: Adapter, *, family: str, about: Mapping[str, str] | None = None
) -> None:
    """Write the file that ComfyUI reads, complete or not.

    Where the model's own code has several projections in one, so has the file, see
    ``lora_pair.fuse``. Of HunyuanVideo alpha is left out where it is the rank, for diffusers reads
    such files only without.

    Raises:
        UserError: A projection has no name there, or a number is not finite.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, list[int]] = {}
    for module, pair, parts in _own_pairs(path, adapter, family):
        tensors |= _comfyui_tensors(module, pair, family)
        if parts:
            ranks[module] = parts
    metadata = {**(about or {}), RANKS: json.dumps(ranks, sort_keys=True)}
    _refuse_overflow(path, tensors)
    with atomic.replacing(path, point="lora") as temporary:
        write_tensors(temporary, tensors, metadata=metadata)


def read_lora(path: Path) -> Adapter:
    """Read a LoRA file that diffusers, PEFT, ComfyUI's trainers, kohya's or musubi's wrote.

    Its tensors are in memory of their own. Where a file has no alpha, it is the rank.

    Raises:
        UserError: It is damaged, holds numbers that are not finite, or what is no LoRA of a
            transformer.
    """
    header = read_header(path)
    header.sizes()  # refuses what cannot be dealt to its parts, before anything is read
    alphas = _Alphas(header)
    pairs: dict[str, Pair] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for module in header.keys:
                pairs |= _diffusers_pairs(header, module, _read_pair(header, module, file, alphas))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({error}); fetch it again") from None
    return Adapter.of(pairs)


def _refuse_overflow(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path.name}: {name} is not finite in {kind}; if its numbers are too large for "
                "that, write it in float32"
            )


def _with_biases(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT gives a bias to all adapters of a model or to none."""
    pairs = adapter.pairs()
    tensors = dict(adapter.tensors)
    if any(pair.bias is not None for pair in pairs.values()):
        for module, pair in pairs.items():
            tensors.setdefault(f"{module}.lora_B.bias", pair.up.new_zeros(len(pair.up)))
    return tensors


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    pairs = adapter.pairs()
    config = {
        "r": adapter.rank,
        "lora_alpha": _plain(adapter.alpha),
        "target_modules": sorted(pairs),
        # PEFT matches these from the end of a name; ^ keeps proj_out from being every block's.
        "rank_pattern": {f"^{m}": p.rank for m, p in pairs.items() if p.rank != adapter.rank},
        "alpha_pattern": {f"^{m}": _plain(a) for m, a in adapter.alpha_pattern.items()},
        "lora_bias": any(pair.bias is not None for pair in pairs.values()),
    }
    return {PREFIX + key: value for key, value in config.items()}


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _own_pairs(path: Path, adapter: Adapter, family: str) -> list[tuple[str, Pair, list[int]]]:
    """Adapters by the names of the model's own code, and the ranks of those that are several."""
    pairs = adapter.pairs()
    found: dict[str, tuple[Pair, list[int]]] = {}
    for module in pairs:
        named = own_name(module, family)
        if named is None:
            raise UserError(f"{path}: {module} has no name in {family} as ComfyUI has it")
        own, parts = named
        if len(parts) == 1:
            pair = pairs[module]
            found[own] = (swap_halves(pair) if module == SWAPPED else pair, [])
        elif own not in found:
            given = [pairs.get(part) for part in parts]
            found[own] = fuse(given, _outputs(given))
    return [("diffusion_model." + own, pair, ranks) for own, (pair, ranks) in found.items()]


def _outputs(parts: list[Pair | None]) -> tuple[int, ...]:
    """Outputs of all parts of a projection, of which some may have no adapter."""
    pair = next(pair for pair in parts if pair is not None)
    inputs = pair.down.shape[1]
    if len(parts) == 3:
        return (len(pair.up),) * 3
    return (inputs,) * 3 + (len(parts[3].up) if parts[3] else MLP_RATIO * inputs,)


def _comfyui_tensors(module: str, pair: Pair, family: str) -> dict[str, Tensor]:
    down, up = ("lora_A", "lora_B") if is_hunyuan(family) else ("lora_down", "lora_up")
    tensors = {f"{module}.{down}.weight": pair.down, f"{module}.{up}.weight": pair.up}
    if pair.scale != 1 or not is_hunyuan(family):
        tensors[f"{module}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
    if pair.bias is not None:
        tensors[f"{module}.diff_b"] = pair.bias * pair.scale
    return tensors


def _read_pair(header: Header, module: str, file: Any, alphas: "_Alphas") -> Pair:
    keys = header.keys[module]
    found = {kind: file.get_tensor(key).clone() for kind, key in keys.items()}
    alpha = float(found["alpha"]) if "alpha" in found else alphas.of(module)
    for kind, tensor in found.items():
        if kind != "alpha" and not is_finite(tensor):
            raise UserError(f"{header.file}: {keys[kind]} is not finite; the LoRA is damaged")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UserError(f"{header.file}: alpha of {module} is {alpha:g}, not a positive number")
    pair = Pair(found["down"], found["up"], alpha, found.get("bias"))
    if "diff_b" in found:
        pair = replace(pair, bias=found["diff_b"] / pair.scale)
    return pair


def _diffusers_pairs(header: Header, module: str, pair: Pair) -> dict[str, Pair]:
    names = diffusers_names(module)
    if len(names) == 1:
        swapped = names[0] == SWAPPED and "adaLN" in module
        return {names[0]: swap_halves(pair) if swapped else pair}
    size = header.size(module)
    outputs = split(size.outputs, inputs=size.inputs, parts=len(names))
    assert outputs is not None, "header.sizes() refuses it"
    parts = unfuse(pair, outputs, header.ranks(module))
    return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


class _Alphas:
    """Alpha of the modules that have none of their own, as diffusers and PEFT write it."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._config = _config_beside(header) or _config_within(header)
        if self._config.get("use_dora"):
            raise UserError(f"{header.file}: was trained with use_dora, which is not supported")
        told = RANKS in header.metadata or any("alpha" in keys for keys in header.keys.values())
        if not self._config and not told:
            logger.warning("%s: says no alpha; taken to be the rank, a scale of 1", header.file)

    def of(self, module: str) -> float:
        """By the names of diffusers; the rank where nothing is said."""
        rank = self._header.size(module).rank
        (name, *_) = diffusers_names(module)
        found = self._from_pattern(name)
        alpha = self._config.get("lora_alpha", rank) if found is None else found
        if not isinstance(alpha, int | float):
            raise UserError(
                f"{self._header.file}: alpha of {module} is {alpha!r}, not a positive number"
            )
        return alpha * math.sqrt(rank) if self._config.get("use_rslora") else float(alpha)

    def _from_pattern(self, name: str) -> Any:
        """As PEFT reads ``alpha_pattern``: expressions for the ends of names, the first counts."""
        for pattern, alpha in (self._config.get("alpha_pattern") or {}).items():
            try:
                if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                    return alpha
            except re.error as error:
                raise UserError(
                    f"{self._header.file}: alpha_pattern {pattern!r} is no expression ({error})"
                ) from None
        return None


def _config_within(header: Header) -> dict[str, Any]:
    try:
        config = json.loads(header.metadata.get(METADATA, "{}"))
        return {key.removeprefix(PREFIX): value for key, value in config.items()}
    except (ValueError, AttributeError):
        raise UserError(f"{header.file}: its {METADATA} is damaged; fetch it again") from None


def _config_beside(header: Header) -> dict[str, Any]:
    """PEFT's own files have it in a file beside them."""
    path = header.file.with_name("adapter_config.json")
    if header.file.name != "adapter_model.safetensors" or not path.is_file():
        return {}
    config = atomic.read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: is damaged; fetch it again")
    return config
