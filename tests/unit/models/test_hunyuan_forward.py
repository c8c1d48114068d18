# SPDX-License-Identifier: Apache-2.0
"""Our forward pass of HunyuanVideo is diffusers': outputs and gradients."""

from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from fastvideo.models import hunyuan_forward
from fastvideo.models.execution import Execution
from tests.gradients import distances, gradients, relative

TOLERANCE = 1e-6
"""Relative, in the 2-norm, float32."""

WHOLE_NUMBERS = ("timestep", "guidance", "encoder_attention_mask")
"""Inputs that have no gradient, and that pipelines leave as they are or that bfloat16 holds."""


def build(*, guidance: bool = True) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        guidance_embeds=guidance,
        text_embed_dim=32,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    )
    for parameter in model.parameters():  # norms start at one, which would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    return model


def inputs(
    *, guidance: bool = True, shape: tuple[int, ...] = (3, 3, 8, 12), rows: int = 20
) -> dict[str, Tensor]:
    """Latents of ``shape`` (B, T, Y, X) and texts of full length, of 7 rows and of 1."""
    generator = torch.Generator().manual_seed(1)
    batch, *grid = shape
    lengths = torch.tensor([rows, 7, 1])[:batch]
    given = {
        "hidden_states": torch.randn(batch, 16, *grid, generator=generator),
        "timestep": torch.tensor([987.3, 20.5, 500.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, rows, 32, generator=generator),
        "encoder_attention_mask": (torch.arange(rows) < lengths.unsqueeze(1)).float(),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
    }
    if guidance:
        given["guidance"] = torch.tensor([6000.0, 1000.0, 3500.0])[:batch]
    return given


def theirs(model: HunyuanVideoTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given, return_dict=False)[0]
    return output


def ours(model: HunyuanVideoTransformer3DModel, given: dict[str, Any]) -> Tensor:
    return hunyuan_forward.forward(model, **given)


def ours_recomputed(model: HunyuanVideoTransformer3DModel, given: dict[str, Any]) -> Tensor:
    hunyuan_forward.attach(model, Execution("full"))
    output: Tensor = model(**given)
    return output


def ours_but_attention_recomputed(
    model: HunyuanVideoTransformer3DModel, given: dict[str, Any]
) -> Tensor:
    hunyuan_forward.attach(model, Execution("selective"))
    output: Tensor = model(**given)
    return output


@pytest.mark.parametrize("shape", [(3, 3, 8, 12), (1, 1, 2, 2), (2, 5, 6, 4)])
@pytest.mark.parametrize("guidance", [True, False])
def test_output_equals_diffusers(guidance: bool, shape: tuple[int, ...]) -> None:
    model, given = build(guidance=guidance), inputs(guidance=guidance, shape=shape)
    assert relative(ours(model, given), theirs(model, given)) <= TOLERANCE


@pytest.mark.parametrize("run", [ours, ours_recomputed, ours_but_attention_recomputed])
@pytest.mark.parametrize("guidance", [True, False])
def test_gradients_equal_diffusers(guidance: bool, run: Any) -> None:
    model, given = build(guidance=guidance), inputs(guidance=guidance)
    expected = gradients(theirs, model, given, fixed=WHOLE_NUMBERS)
    found = gradients(run, model, given, fixed=WHOLE_NUMBERS)
    apart = distances(found, expected)
    for name, gradient in expected.items():
        if is_without_effect(name):
            assert gradient.norm() <= TOLERANCE * expected[name.replace("bias", "weight")].norm()
            assert found[name].norm() <= TOLERANCE * expected[name.replace("bias", "weight")].norm()
            continue
        assert gradient.norm() > 0, f"{name} is not tested: its gradient is zero"
        assert apart[name] <= TOLERANCE, name


def is_without_effect(name: str) -> bool:
    """Keys of the text refiner are not normalised: softmax ignores what is added to all."""
    return "token_refiner" in name and name.endswith("to_k.bias")


def test_bfloat16_weights_equal_diffusers() -> None:
    half, given = build().bfloat16(), inputs_in_bfloat16()
    assert relative(ours(half, given), theirs(half, given)) <= TOLERANCE


def test_training_in_bfloat16_is_near_sampling_in_bfloat16() -> None:
    """Autocast over float32 weights against weights loaded in bfloat16, as pipelines do."""
    model, given = build(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = ours(model, given)
    assert relative(trained, theirs(model, given)) <= 2e-2
    sampled = theirs(build().bfloat16(), inputs_in_bfloat16())
    assert relative(trained, sampled) <= 2e-2


@pytest.mark.parametrize("name", ["timestep", "guidance"])
def test_the_steps_are_not_rounded_under_autocast(name: str) -> None:
    """987 and 988 are one number in bfloat16, and must not be to the model."""
    model, given = build(), inputs(shape=(1, 1, 2, 2))
    embed = model.time_text_embed
    embedder = embed.timestep_embedder if name == "timestep" else embed.guidance_embedder
    steps = torch.tensor([987.0, 988.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hunyuan_forward.embed_steps(embed.time_proj, embedder, steps)
        outputs = [ours(model, {**given, name: step.view(1)}) for step in steps]
    assert torch.equal(found, embedder(embed.time_proj(steps)))
    assert not torch.equal(*found)
    assert not torch.equal(*outputs)


def test_positions_are_not_rounded_under_autocast() -> None:
    model, given = build(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.rope(given["hidden_states"])
    for found, expected in zip(rounded, model.rope(given["hidden_states"]), strict=True):
        assert torch.equal(found, expected)


def inputs_in_bfloat16() -> dict[str, Tensor]:
    return {n: t if n in WHOLE_NUMBERS else t.bfloat16() for n, t in inputs().items()}


def test_a_changed_input_changes_the_output() -> None:
    model, given = build(), inputs()
    reference = ours(model, given)
    for name in given:
        if name != "encoder_attention_mask":
            changed = {**given, name: given[name].flip(-1)}
            assert relative(ours(model, changed), reference) > 1e-3, name


def test_a_changed_length_of_the_text_changes_the_output() -> None:
    model, given = build(), inputs()
    reference = ours(model, given)
    given["encoder_attention_mask"][1, 7] = 1
    assert relative(ours(model, given)[1], reference[1]) > 1e-3


def test_rows_past_the_text_do_not_matter_at_all() -> None:
    model, given = build(), inputs()
    reference = ours(model, given)
    given["encoder_hidden_states"][1, 7:] += 100
    given["encoder_hidden_states"][2, 1:] = -3
    assert torch.equal(ours(model, given), reference)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
def test_the_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    model, given = build(), inputs()
    reference = ours(model, given)
    given["encoder_attention_mask"] = given["encoder_attention_mask"].to(dtype)
    assert torch.equal(ours(model, given), reference)


@pytest.mark.parametrize("guidance", [True, False])
def test_guidance_is_given_to_the_models_that_have_it_only(guidance: bool) -> None:
    with pytest.raises(AssertionError):
        ours(build(guidance=guidance), inputs(guidance=not guidance))
