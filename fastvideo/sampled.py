# SPDX-License-Identifier: Apache-2.0
"""The model that `generate` samples: an export, checkpoints or the base, with adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo import atomic, hashing, trained
from fastvideo.config.recipe import Recipe
from fastvideo.config.train import Lora
from fastvideo.errors import UserError
from fastvideo.models.family import SamplerSettings, find_family, pick_device
from fastvideo.models.folder import find_model
from fastvideo.models.lora_folder import Chosen, check_chosen, choose
from fastvideo.models.lora_header import read_header
from fastvideo.state import NORM_FILES, RunDir, checkpoint_marker

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Sampled:
    """A model, before anything of it is loaded."""

    folder: Path
    """In diffusers' format."""
    about: Mapping[str, Any]
    """What tells it from another one, plain values."""
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    """By transformer, what is sampled instead of the folder's, or as its adapter."""
    loras: Sequence[Chosen] = ()
    norms: Mapping[str, Path] = field(default_factory=dict)
    """By transformer, files with norms that trained beside adapters."""


def find(recipe: Recipe) -> Sampled:
    """Find what ``generate.weights`` and ``generate.loras`` name; needs no torch.

    Raises:
        UserError: There is none, or it does not fit the recipe's model.
    """
    base = find_model(recipe.model.path)
    find_family(recipe).check(base)
    finders = {"base": _base, "checkpoint": _checkpoints, "export": _export}
    found = finders[recipe.generate.weights](recipe, base)
    check_chosen(found.loras, found.folder, recipe.model.family)
    return found


def about_loras(recipe: Recipe) -> list[dict[str, Any]]:
    """What tells the files of ``generate.loras`` from others, checked as far as files are here.

    Raises:
        UserError: One is no LoRA, or does not fit the recipe's model.
    """
    chosen = _loras(recipe)
    if (base := Path(recipe.model.path).expanduser()).is_dir():
        check_chosen(chosen, base, recipe.model.family)
    return [_about(lora) for lora in chosen]


def load(recipe: Recipe, sampled: Sampled) -> "DiffusionPipeline":
    """Load the pipeline and everything that belongs to it.

    Raises:
        UserError: A part is damaged, or offloading is asked for on the CPU.
    """
    spec, family = recipe.generate, find_family(recipe)
    device = pick_device(spec.device)
    if spec.offload != "none" and device == "cpu":
        raise UserError(f"generate.offload={spec.offload}: is for a GPU; use none on the CPU")
    settings = SamplerSettings(
        dtype=spec.dtype,
        device=device,
        offload=spec.offload,
        vae_tiling=spec.vae_tiling,
        flow_shift=spec.flow_shift,
    )
    is_lora = isinstance(recipe.train.method, Lora)
    transformers = {} if is_lora else _transformers(recipe, sampled)
    return family.load_pipeline(
        sampled.folder,
        settings=settings,
        transformers=transformers,
        adapt=lambda pipeline: _adapt(pipeline, recipe, sampled),
    )


def _base(recipe: Recipe, base: Path) -> Sampled:
    about = {"path": recipe.model.path, "files": hashing.folder_stamp(base)}
    return Sampled(base, about, loras=_loras(recipe))


def _checkpoints(recipe: Recipe, base: Path) -> Sampled:
    found = trained.newest(recipe, base)
    replaced = () if isinstance(recipe.train.method, Lora) else tuple(found)
    about = {
        "path": recipe.model.path,
        "files": hashing.folder_stamp(base, without=replaced),
        "checkpoints": {
            name: hashing.file_sha256(checkpoint_marker(path)) for name, path in found.items()
        },
        "average": recipe.averaged,
    }
    return Sampled(base, about, found, _loras(recipe))


def _export(recipe: Recipe, base: Path) -> Sampled:
    run_dir = RunDir(recipe.run_dir)
    made_from = atomic.read_json(run_dir.export_marker)
    if made_from is None:
        raise UserError(f"{run_dir.export}: holds no complete export; run export first")
    method = made_from.get("method", "full")  # exports of before there were others
    if method != recipe.train.method.kind:
        raise UserError(
            f"{run_dir.export}: was exported with train.method.kind={method}, the recipe says "
            f"{recipe.train.method.kind}; use the recipe it was trained with"
        )
    about = {"path": str(run_dir.export), "made_from": made_from}
    if not isinstance(recipe.train.method, Lora):
        return Sampled(run_dir.export, about, loras=_loras(recipe))
    trained.newest(recipe, base)  # refuses another base model than theirs
    ours = choose(
        run_dir.export,
        scale=1.0,
        transformer=None,
        known=recipe.architecture.transformers,
        key="generate.weights=export",
    )
    norms = {name: run_dir.export / file for name, file in NORM_FILES.items()}
    return Sampled(
        base,
        {**about, "base": recipe.model.path, "files": hashing.folder_stamp(base)},
        loras=[*ours, *_loras(recipe)],
        norms={name: path for name, path in norms.items() if path.is_file()},
    )


def _loras(recipe: Recipe) -> list[Chosen]:
    return [
        chosen
        for index, lora in enumerate(recipe.generate.loras)
        for chosen in choose(
            lora.path,
            scale=lora.scale,
            transformer=lora.transformer,
            known=recipe.architecture.transformers,
            key=f"generate.loras[{index}]",
        )
    ]


def _about(lora: Chosen) -> dict[str, Any]:
    read_header(lora.file).sizes()  # refuses what is none
    return {
        "path": str(lora.file),
        "transformer": lora.transformer,
        "scale": lora.scale,
        "sha256": hashing.file_sha256(lora.file),
    }


def _transformers(recipe: Recipe, sampled: Sampled) -> dict[str, Any]:
    """Those that were trained whole."""
    from fastvideo.checkpoint import load_weights, part_of, verify
    from fastvideo.models.weights import materialise

    family, found = find_family(recipe), {}
    for name, checkpoint in sampled.checkpoints.items():
        model: Any = family.empty_transformer(
            sampled.folder, folder=name, dtype=recipe.generate.dtype
        )
        materialise(model, "cpu")
        verify(checkpoint)
        load_weights(checkpoint, model, part=part_of(checkpoint, average=recipe.averaged))
        found[name] = model
    return found


def _adapt(pipeline: "DiffusionPipeline", recipe: Recipe, sampled: Sampled) -> None:
    """Apply the adapters of checkpoints first, then those of files."""
    is_lora = isinstance(recipe.train.method, Lora)
    if not sampled.loras and not (is_lora and sampled.checkpoints):
        return
    from safetensors.torch import load_file

    from fastvideo.models.lora_apply import Applied, apply_loras, apply_norms, read_chosen

    applied = []
    norms = {name: load_file(path) for name, path in sampled.norms.items()}
    if is_lora:
        from fastvideo.checkpoint import part_of
        from fastvideo.trained_adapters import read_adapter

        for name, path in sampled.checkpoints.items():
            part = part_of(path, average=recipe.averaged)
            found = read_adapter(
                recipe, sampled.folder, transformer=name, checkpoint=path, part=part
            )
            applied.append(Applied(name, found.adapter))
            norms[name] = dict(found.others)
    apply_loras(pipeline, [*applied, *map(read_chosen, sampled.loras)])
    for name, tensors in norms.items():
        apply_norms(getattr(pipeline, name), tensors)
