# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in a transformer: peft's layers, with numbers that depend on no layout.

Axes: B samples, D inputs of a projection; a projection may see tokens between them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastvideo import hashing
from fastvideo.config.lora import BLOCK, targets
from fastvideo.config.train import Lora
from fastvideo.models.weights import local_rows

ADAPTER = "default"
"""peft's name of the adapter that trains."""
_BASE = ".base_layer."
_OURS = re.compile(rf"(.+\.lora_[AB])\.{ADAPTER}\.(weight|bias)")
_CASTED = (nn.Linear, nn.Conv3d, nn.Conv2d)


def add_adapters(model: nn.Module, method: Lora) -> None:
    """Give the chosen projections an adapter and freeze all else.

    Adapters are float32 and on the meta device, whatever the model is: ``weights.materialise``
    gives them memory, `fill_adapters` or a checkpoint their numbers.

    Raises:
        UserError: A pattern of ``method.targets`` matches no projection.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = targets(method, names)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha or method.rank,
        lora_bias=method.biases,
        target_modules="|".join(map(re.escape, chosen)),  # a list would be matched by endings
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in _layers(model):
        layer.cast_input_dtype_enabled = False  # autocast does it, without a copy in float32
        layer.lora_dropout[ADAPTER] = Dropout(name, method.dropout)
        for module in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            module.float().requires_grad_(True)
    if method.norms:
        for parameter in _norms(model):
            parameter.requires_grad_(True)


def hold_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen projections in the dtype that autocast would cast them to in each forward.

    The timestep's embedding is computed in float32, and stays.
    """
    exact = {
        inner
        for module in model.modules()
        if isinstance(module, TimestepEmbedding)
        for inner in module.modules()
    }
    for module in model.modules():
        if isinstance(module, _CASTED) and module not in exact:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def fill_adapters(model: nn.Module, *, seed: int) -> None:
    """Draw A as peft does, uniformly within ``in ** -0.5``, and set B to zero.

    The numbers are a function of the seed and the projection's name: every process that holds a
    part of an adapter holds that part of the same one.
    """
    for name, layer in _layers(model):
        generator = torch.Generator().manual_seed(hashing.seed_of(seed, "adapter", name))
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER]
        whole = torch.empty(tuple(a.shape))
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        ours, first = local_rows(a)
        ours.copy_(whole[first : first + len(ours)])
        for parameter in b.parameters():
            local_rows(parameter)[0].zero_()


def base_names(names: Iterable[str]) -> dict[str, str]:
    """Names of a transformer with adapters to those in the model's files; adapters have none."""
    return {name: name.replace(_BASE, ".") for name in names if _OURS.fullmatch(name) is None}


def adapter_tensors(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What adapters hold, by the names of LoRA files: ``blocks.0.attn1.to_q.lora_A.weight``."""
    found = {name: _OURS.fullmatch(name) for name in trained}
    return {f"{match[1]}.{match[2]}": trained[name] for name, match in found.items() if match}


def other_tensors(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What trains beside adapters: norms, by their names in the model's files."""
    return {name: tensor for name, tensor in trained.items() if not _OURS.fullmatch(name)}


class Dropout(nn.Module):
    """Sets inputs of an adapter to zero, the same ones for all tokens of a sample.

    With one mask a sample (Gal and Ghahramani, 2016) the numbers are a function of the sample's
    seed and the projection's name: no layout, recomputation or restart changes them.
    """

    def __init__(self, name: str, share: float) -> None:
        """``share`` of the inputs are zero in the mean."""
        super().__init__()
        self.name, self.share = name, share
        self.mask_BD: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Mask ``x``, (B, ..., D), or (B times something, ..., D), while training."""
        if self.mask_BD is None or not self.training:
            return x
        mask = self.mask_BD.repeat_interleave(len(x) // len(self.mask_BD), dim=0)
        return x * mask.view(len(x), *[1] * (x.ndim - 2), -1).to(x.dtype)


def draw_dropout(model: nn.Module, seeds: Sequence[int], *, device: str) -> None:
    """Draw the masks of a micro-batch, whose samples have these seeds."""
    for _, layer in _layers(model):
        dropout = layer.lora_dropout[ADAPTER]
        if dropout.share:
            rows = [_mask(dropout, layer.in_features, seed) for seed in seeds]
            dropout.mask_BD = torch.stack(rows).to(device, non_blocking=True)


def _mask(dropout: Dropout, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(hashing.seed_of(seed, "dropout", dropout.name))
    kept = torch.rand(size, generator=generator) >= dropout.share
    return kept.float() / (1 - dropout.share)


def _layers(model: nn.Module) -> Iterable[tuple[str, LoraLayer]]:
    """Projections with an adapter, by the names that they have without one."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def _norms(model: nn.Module) -> Iterable[nn.Parameter]:
    """Weights and biases of the norms in blocks."""
    for name, module in model.named_modules():
        if re.match(BLOCK, name) and "Norm" in type(module).__name__:
            yield from module.parameters(recurse=False)
