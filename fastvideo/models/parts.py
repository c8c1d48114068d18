# SPDX-License-Identifier: Apache-2.0
"""Parts of a model folder, loaded whole or refused, the same in preprocessing and sampling."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo.errors import UserError
from fastvideo.models.family import Adapt, SamplerSettings
from fastvideo.models.folder import loading, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase


def load_part(kind: Any, path: Path, folder: str, *, dtype: str) -> Any:
    """Load a model of diffusers or transformers, in evaluation mode.

    Raises:
        UserError: It cannot be loaded, or its files lack weights, for which the libraries would put
            random numbers and a warning.
    """
    import torch

    with loading(path, folder):
        model, report = kind.from_pretrained(
            path,
            subfolder=folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    refuse_missing(report["missing_keys"], path, folder)
    return model


def empty_part(kind: Any, path: Path, folder: str, *, dtype: str) -> Any:
    """Build what `load_part` loads on the meta device: shapes and dtypes without numbers.

    Tables that are computed rather than loaded are on the meta device as well.

    Raises:
        UserError: The folder's config.json is missing or another model's.
    """
    import torch

    config = read_config(path, f"{folder}/config.json")
    with loading(path, folder), torch.device("meta"):
        model = kind.from_config(config).eval()
    # As from_pretrained casts what it loads.
    kept = set(kind._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        wanted = "float32" if kept & set(name.split(".")) else dtype
        parameter.data = parameter.data.to(getattr(torch, wanted))
    return model


def refuse_missing(names: Collection[str], path: Path, folder: str) -> None:
    """Refuse weights that lack the tensors ``names``, if there are any, with a ``UserError``."""
    if names:
        raise UserError(
            f"model.path={path}: the weights in {folder} lack {len(names)} tensors of the model "
            f"that its config.json describes ({min(names)}, ...); fetch it again, or give a whole "
            "diffusers folder"
        )


def load_tokenizer(path: Path, folder: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in ``folder`` of a model; ``tokenizer.json`` counts, not the class named.

    transformers 5 builds the classes that published models name by rules of its own: as
    ``LlamaTokenizerFast``, which HunyuanVideo's model_index.json names, Llama 3's byte-level
    vocabulary is split as Llama 2's was, and ``T5TokenizerFast`` has no byte fallback. Such a model
    would be trained and sampled on other tokens than it was made with.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    as_written = (path / folder / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if as_written else AutoTokenizer
    with loading(path, folder):
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(
            path, subfolder=folder, local_files_only=True
        )
    return tokenizer


def assemble_without_encoders(
    name: str, path: Path, parts: Mapping[str, Any], *, settings: SamplerSettings
) -> "DiffusionPipeline":
    """As `assemble`, but what is not in ``parts`` is left out, all but the scheduler."""
    index = read_config(path, "model_index.json")
    named = {key for key, value in index.items() if isinstance(value, list)}
    left_out = dict.fromkeys(named - {*parts, "scheduler"})
    return assemble(name, path, {**left_out, **parts}, settings=settings)


def assemble(
    name: str,
    path: Path,
    parts: Mapping[str, Any],
    *,
    settings: SamplerSettings,
    adapt: Adapt | None = None,
) -> "DiffusionPipeline":
    """Make the pipeline ``name`` of diffusers from loaded parts and the folder's scheduler.

    ``adapt`` comes before offloading: hooks of that leave nothing in place that could be changed.
    """
    import diffusers
    import torch

    with loading(path, "pipeline"):
        pipeline: DiffusionPipeline = getattr(diffusers, name).from_pretrained(
            path, **parts, dtype=getattr(torch, settings.dtype), local_files_only=True
        )
    if adapt is not None:
        adapt(pipeline)
    return _set_up(pipeline, settings)


def _set_up(pipeline: "DiffusionPipeline", settings: SamplerSettings) -> "DiffusionPipeline":
    """Bring a loaded pipeline to its device with the memory options."""
    pipeline.set_progress_bar_config(disable=True)
    if settings.flow_shift is not None:
        scheduler = pipeline.scheduler
        key = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        pipeline.scheduler = scheduler.from_config(scheduler.config, **{key: settings.flow_shift})
    if settings.vae_tiling:
        pipeline.vae.enable_tiling()
    if settings.offload == "none":
        return pipeline.to(settings.device)
    assert settings.device != "cpu", "refused before loading"
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload(device=settings.device)
    else:
        pipeline.enable_sequential_cpu_offload(device=settings.device)
    return pipeline
