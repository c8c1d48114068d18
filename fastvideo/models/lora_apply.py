# SPDX-License-Identifier: Apache-2.0
"""LoRA files into a pipeline of diffusers, through our own reader: every format, every alpha."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastvideo.models.lora_file import Adapter, for_diffusers, read_lora
from fastvideo.models.lora_folder import Chosen


@dataclass(frozen=True)
class Applied:
    """The LoRA of a transformer of the pipeline, and how much of it."""

    transformer: str
    adapter: Adapter
    scale: float = 1.0


def read_chosen(chosen: Chosen) -> Applied:
    """Read the file that was chosen."""
    return Applied(chosen.transformer, read_lora(chosen.file), chosen.scale)


def apply_loras(pipeline: Any, loras: Iterable[Applied]) -> None:
    """Load LoRAs and set their scales, as ``load_lora_weights`` and ``set_adapters`` do."""
    scales: dict[str, dict[str, float]] = defaultdict(dict)
    for number, lora in enumerate(loras):
        tensors, metadata = for_diffusers(lora.adapter)
        name = f"lora_{number}"
        with warnings.catch_warnings():  # that there are several is meant
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            pipeline.load_lora_into_transformer(
                tensors,
                transformer=getattr(pipeline, lora.transformer),
                adapter_name=name,
                metadata=metadata,
                low_cpu_mem_usage=True,
                _pipeline=pipeline,
            )
        scales[lora.transformer][name] = lora.scale
    for transformer, of in scales.items():
        getattr(pipeline, transformer).set_adapters(list(of), list(of.values()))


def apply_norms(transformer: nn.Module, norms: Mapping[str, Tensor]) -> None:
    """Replace the norms that trained beside adapters."""
    unknown = transformer.load_state_dict(dict(norms), strict=False).unexpected_keys
    assert not unknown, unknown
