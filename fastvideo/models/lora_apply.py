# SPDX-License-Identifier: Apache-2.0
"""LoRA files into a pipeline of diffusers, through our own reader: every format, every alpha."""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from fastvideo.models.lora_file import for_diffusers, read_lora
from fastvideo.models.lora_folder import Chosen


def apply_loras(pipeline: Any, loras: Sequence[Chosen]) -> None:
    """Load LoRAs and set their scales, as ``load_lora_weights`` and ``set_adapters`` do."""
    scales: dict[str, dict[str, float]] = defaultdict(dict)
    for number, lora in enumerate(loras):
        tensors, metadata = for_diffusers(read_lora(lora.file))
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
