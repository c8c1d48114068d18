# SPDX-License-Identifier: Apache-2.0
"""One block of real width of every released architecture: our forward is diffusers', in float32."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from fastvideo.config.architectures import releases
from fastvideo.models import hunyuan_forward, wan_forward

TOLERANCE = 1e-6
"""Relative, in the 2-norm."""

LATENTS = (1, 4, 4, 4)
"""B, T, Y, X: four tokens in each of four frames."""

NOISE = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))


def one_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments for the same model with one block of each kind."""
    depths = {name: 1 for name in ("num_layers", "num_single_layers") if name in config}
    given = {n: v for n, v in config.items() if v is not None and not n.startswith("_")}
    return given | depths


def distinct() -> list[Any]:
    """Name the releases that differ with one block; those of 480p and 720p do not."""
    seen: list[dict[str, Any]] = []
    params = []
    for release in releases():
        config = one_block(release.transformer)
        if config not in seen:
            seen.append(config)
            params.append(pytest.param(config, id=release.name))
    return params


def is_hunyuan(config: Mapping[str, Any]) -> bool:
    return "num_single_layers" in config


def build(config: dict[str, Any]) -> nn.Module:
    """Build the model without its slow initialisation."""
    kind = HunyuanVideoTransformer3DModel if is_hunyuan(config) else WanTransformer3DModel
    with torch.device("meta"):
        model: nn.Module = kind(**config)
    model.to_empty(device="cpu")
    if not is_hunyuan(config):  # its tables are buffers
        model.rope = WanRotaryPosEmbed(
            config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"]
        )
    fill(model)
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill matrices so that they keep the size of vectors, norms near one, the rest near zero."""
    twice = NOISE.repeat(2)
    place = 0  # where in the noise a parameter begins, so that no two are alike
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith("scale_shift_table")
        scale = (len(parameter) / parameter.numel()) ** 0.5 if is_matrix else 0.1
        for piece in parameter.view(-1).split(len(NOISE)):
            torch.mul(twice[place : place + len(piece)], scale, out=piece)
        if "norm" in name and name.endswith("weight") and not is_matrix:
            parameter.add_(1)
        place = (place + parameter.numel()) % len(NOISE)


def inputs(config: dict[str, Any]) -> dict[str, Tensor]:
    """Draw what the pipelines pass, with as few rows of text as the architecture allows."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch, *grid = LATENTS
    given = {
        "hidden_states": normal(batch, config["in_channels"], *grid),
        "timestep": torch.full((batch,), 987.3),
    }
    if is_hunyuan(config):
        return given | {
            "encoder_hidden_states": normal(batch, 8, config["text_embed_dim"]),
            "encoder_attention_mask": (torch.arange(8) < 5).float().expand(batch, -1),
            "pooled_projections": normal(batch, config["pooled_projection_dim"]),
            "guidance": torch.full((batch,), 6000.0),
        }
    if config["in_channels"] == 48:  # the first frame is clean
        given["timestep"] = torch.tensor([0.0] * 4 + [987.3] * 12).expand(batch, -1)
    if "image_dim" in config:  # diffusers takes all but 512 rows for the image
        given["encoder_hidden_states_image"] = normal(batch, 8, config["image_dim"])
        return given | {"encoder_hidden_states": normal(batch, 512, config["text_dim"])}
    return given | {"encoder_hidden_states": normal(batch, 8, config["text_dim"])}


@pytest.mark.parametrize("config", distinct())
def test_output_and_gradients_equal_diffusers(config: dict[str, Any]) -> None:
    model, given = build(config), inputs(config)
    given["hidden_states"].requires_grad_()
    leaves = dict(model.named_parameters()) | {"hidden_states": given["hidden_states"]}
    output, gradients = run(lambda: ours(model, given), leaves)
    expected, expected_gradients = run(lambda: model(**given, return_dict=False)[0], leaves)
    assert (output - expected).norm() <= TOLERANCE * expected.norm()
    bound = cache(lambda: rounding(model, given, leaves, expected_gradients))
    for name in leaves:
        difference = (gradients[name] - expected_gradients[name]).norm()
        if "token_refiner" in name and name.endswith("to_k.bias"):  # softmax does not see it
            weight = expected_gradients[name.replace("bias", "weight")]
            assert expected_gradients[name].norm() <= TOLERANCE * weight.norm()
            assert difference <= TOLERANCE * weight.norm()
        else:
            size = expected_gradients[name].norm()
            assert size > 0, name
            assert difference <= TOLERANCE * size or difference <= 2 * bound() * size, name


def rounding(
    model: nn.Module,
    given: dict[str, Any],
    leaves: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> float:
    """How far diffusers is from itself where products have twice the rows, on this processor."""
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in given.items()}
    batch = len(given["hidden_states"])

    def mean() -> Tensor:
        both: Tensor = model(**twice, return_dict=False)[0]
        return (both[:batch] + both[batch:]) / 2

    _, found = run(mean, leaves)
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in leaves)


def ours(model: nn.Module, given: dict[str, Any]) -> Tensor:
    if isinstance(model, HunyuanVideoTransformer3DModel):
        return hunyuan_forward.forward(model, **given)
    return wan_forward.forward(model, **given)


def run(
    forward: Callable[[], Tensor], leaves: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients, large ones as sketches.

    A sketch of a gradient is its product with eight random vectors: sketches differ by as much as
    the gradients do (Johnson and Lindenstrauss, 1984), which at this width take gigabytes.
    """
    gradients = {}

    def keep(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        rows = leaf.grad if leaf.ndim < 2 else leaf.grad.flatten(1)
        is_large = rows.numel() > len(NOISE)
        gradients[name] = rows @ NOISE[: 8 * rows.shape[1]].view(-1, 8) if is_large else rows
        leaf.grad = None

    hooks = [
        leaf.register_post_accumulate_grad_hook(partial(keep, name))
        for name, leaf in leaves.items()
    ]
    output = forward()
    output.backward(NOISE[: output.numel()].view(output.shape))
    for hook in hooks:
        hook.remove()
    return output.detach(), gradients
