# SPDX-License-Identifier: Apache-2.0
"""Our forward pass of Wan is diffusers': outputs and gradients."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from fastvideo.models import wan_forward

TOLERANCE = 1e-6
"""Relative, in the 2-norm, float32."""


@pytest.fixture
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=32,
        ffn_dim=256,
        num_layers=2,
    )
    for parameter in model.parameters():  # biases start at zero, which would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    return model


def inputs(*, latents: tuple[int, ...] = (2, 16, 3, 8, 12)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(latents, generator=generator),
        "timestep": torch.tensor([987.3, 20.5][: latents[0]]),
        "text": torch.randn(latents[0], 512, 32, generator=generator),
    }


def theirs(model: WanTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(
        hidden_states=given["latents"],
        timestep=given["timestep"],
        encoder_hidden_states=given["text"],
        return_dict=False,
    )[0]
    return output


def ours(
    model: WanTransformer3DModel,
    given: dict[str, Tensor],
    *,
    activation_checkpointing: bool = False,
) -> Tensor:
    return wan_forward.forward(
        model,
        latents_BCTYX=given["latents"],
        timestep_B=given["timestep"],
        text_BLD=given["text"],
        activation_checkpointing=activation_checkpointing,
    )


def gradients(model: WanTransformer3DModel, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("latents", [(2, 16, 3, 8, 12), (1, 16, 1, 2, 2), (1, 16, 5, 6, 4)])
def test_output_equals_diffusers(model: WanTransformer3DModel, latents: tuple[int, ...]) -> None:
    given = inputs(latents=latents)
    assert relative(ours(model, given), theirs(model, given)) <= TOLERANCE


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_gradients_equal_diffusers(
    model: WanTransformer3DModel, activation_checkpointing: bool
) -> None:
    given = inputs()
    expected = gradients(model, theirs(model, given))
    output = ours(model, given, activation_checkpointing=activation_checkpointing)
    found = gradients(model, output)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name} is not tested: its gradient is zero"
        assert relative(found[name], gradient) <= TOLERANCE, name


def test_bfloat16_weights_equal_diffusers(model: WanTransformer3DModel) -> None:
    half = in_bfloat16(model)
    given = {**inputs(), "text": inputs()["text"].bfloat16()}
    given["latents"] = given["latents"].bfloat16()
    assert relative(ours(half, given), theirs(half, given)) <= TOLERANCE


def test_training_in_bfloat16_is_near_sampling_in_bfloat16(model: WanTransformer3DModel) -> None:
    """Autocast over float32 weights against weights loaded in bfloat16, as pipelines do."""
    given = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = ours(model, given)
    sampled = theirs(
        in_bfloat16(model),
        {name: t if name == "timestep" else t.bfloat16() for name, t in given.items()},
    )
    assert relative(trained, sampled) <= 2e-2
    assert relative(trained, theirs(model, given)) <= 2e-2


def test_the_timestep_is_not_rounded_under_autocast(model: WanTransformer3DModel) -> None:
    """987 and 988 are one number in bfloat16, and must not be to the model."""
    times = []
    for step in (987.0, 988.0):
        given = {**inputs(latents=(1, 16, 1, 2, 2)), "timestep": torch.tensor([step])}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            times.append(
                wan_forward.entry(
                    model,
                    latents_BCTYX=given["latents"],
                    timestep_B=given["timestep"],
                    text_BLD=given["text"],
                )[2]
            )
    assert times[0].dtype == torch.float32
    assert not torch.equal(*times)


def in_bfloat16(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """The weights as ``from_pretrained(dtype=bfloat16)`` has them: some stay float32."""
    half: WanTransformer3DModel = WanTransformer3DModel.from_config(model.config)
    half.load_state_dict(model.state_dict())
    for name, parameter in half.named_parameters():
        if not any(part in name for part in half._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    return half


def test_a_changed_input_changes_the_output(model: WanTransformer3DModel) -> None:
    given = inputs()
    reference = ours(model, given)
    for name in given:
        changed = {**given, name: given[name] + 0.5}
        assert relative(ours(model, changed), reference) > 1e-3, name
