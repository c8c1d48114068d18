# SPDX-License-Identifier: Apache-2.0
"""Our forward pass of Wan is diffusers', of every kind of checkpoint: outputs and gradients."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from fastvideo.models import wan_forward
from fastvideo.models.execution import Execution
from tests.gradients import distances, gradients, relative

TOLERANCE = 1e-6
"""Relative, in the 2-norm, float32."""

CONFIGS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v with CLIP": {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 128},
    "i2v without CLIP": {"in_channels": 36},
    "timestep of each frame": {"in_channels": 48, "out_channels": 48},
    "timestep of each token": {"in_channels": 48, "out_channels": 48},
}
KINDS = list(CONFIGS)


def build(kind: str) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=32,
        ffn_dim=256,
        num_layers=2,
        **CONFIGS[kind],
    )
    for parameter in model.parameters():  # biases start at zero, which would hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    return model


def inputs(kind: str, *, shape: tuple[int, ...] = (2, 3, 8, 12)) -> dict[str, Tensor]:
    """What the pipeline of this kind passes for latents of ``shape`` (B, T, Y, X)."""
    generator = torch.Generator().manual_seed(1)
    batch, *grid = shape
    channels = CONFIGS[kind].get("in_channels", 16)
    steps = torch.tensor([987.3, 20.5])[:batch]
    num_tokens = grid[0] * grid[1] * grid[2] // 4
    if kind == "timestep of each frame":
        moving = (torch.arange(num_tokens) >= num_tokens // grid[0]).float()
        steps = steps.unsqueeze(1) * moving
    if kind == "timestep of each token":
        steps = torch.rand(batch, num_tokens, generator=generator) * 1000
    given = {
        "hidden_states": torch.randn(batch, channels, *grid, generator=generator),
        "timestep": steps,
        "encoder_hidden_states": torch.randn(batch, 512, 32, generator=generator),
    }
    if "image_dim" in CONFIGS[kind]:
        image = torch.randn(batch, 257, CONFIGS[kind]["image_dim"], generator=generator)
        given["encoder_hidden_states_image"] = image
    return given


def theirs(model: WanTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given, return_dict=False)[0]
    return output


def theirs_one_by_one(model: WanTransformer3DModel, given: dict[str, Tensor]) -> Tensor:
    """The same numbers by matrix products of other sizes."""
    samples = [{name: t[i : i + 1] for name, t in given.items()} for i in range(2)]
    return torch.cat([theirs(model, sample) for sample in samples])


def ours(model: WanTransformer3DModel, given: dict[str, Any]) -> Tensor:
    return wan_forward.forward(model, **given)


def ours_recomputed(model: WanTransformer3DModel, given: dict[str, Any]) -> Tensor:
    wan_forward.attach(model, Execution("full"))
    output: Tensor = model(**given)
    return output


def ours_but_attention_recomputed(model: WanTransformer3DModel, given: dict[str, Any]) -> Tensor:
    wan_forward.attach(model, Execution("selective"))
    output: Tensor = model(**given)
    return output


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 1, 2, 2), (1, 5, 6, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_output_equals_diffusers(kind: str, shape: tuple[int, ...]) -> None:
    model, given = build(kind), inputs(kind, shape=shape)
    assert relative(ours(model, given), theirs(model, given)) <= TOLERANCE


@pytest.mark.parametrize("run", [ours, ours_recomputed, ours_but_attention_recomputed])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_diffusers(kind: str, run: Any) -> None:
    model, given = build(kind), inputs(kind)
    expected = gradients(theirs, model, given, fixed=("timestep",))
    # How much rounding a product of another size brings differs between processors.
    themselves = gradients(theirs_one_by_one, model, given, fixed=("timestep",))
    bound = max(TOLERANCE, 2 * max(distances(themselves, expected).values()))
    apart = distances(gradients(run, model, given, fixed=("timestep",)), expected)
    for name, gradient in expected.items():
        assert gradient.norm() > 0, f"{name} is not tested: its gradient is zero"
        assert apart[name] <= bound, name


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_equal_diffusers(kind: str) -> None:
    half, given = in_bfloat16(build(kind)), inputs_in_bfloat16(kind)
    # Diffusers cuts image and text out of one tensor; torch rounds a projection of such a cut
    # twice, before its bias and after.
    for layer in half.blocks:
        for name in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
            if (projection := getattr(layer.attn2, name)) is not None:
                projection.register_forward_pre_hook(lambda _, given: given[0].contiguous())
    assert relative(ours(half, given), theirs(half, given)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_bfloat16_is_near_sampling_in_bfloat16(kind: str) -> None:
    """Autocast over float32 weights against weights loaded in bfloat16, as pipelines do."""
    model, given = build(kind), inputs(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = ours(model, given)
    sampled = theirs(in_bfloat16(model), inputs_in_bfloat16(kind))
    assert relative(trained, sampled) <= 2e-2
    assert relative(trained, theirs(model, given)) <= 2e-2


@pytest.mark.parametrize("shape", [(1,), (1, 6)], ids=["of the sample", "of each token"])
def test_the_timestep_is_not_rounded_under_autocast(shape: tuple[int, ...]) -> None:
    """987 and 988 are one number in bfloat16, and must not be to the model."""
    model, given = build("t2v"), inputs("t2v", shape=(1, 3, 2, 4))
    times = []
    for step in (987.0, 988.0):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            entered = wan_forward.entry(
                model,
                latents_BCTYX=given["hidden_states"],
                timestep=torch.full(shape, step),
                text_BLD=given["encoder_hidden_states"],
            )
        times.append(entered[2])
    assert times[0].dtype == torch.float32
    assert not torch.equal(*times)


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("t2v", 1), ("timestep of each frame", 3), ("timestep of each token", 72)],
)
def test_no_more_modulations_are_held_than_there_are_runs_of_one_timestep(
    kind: str, runs: int
) -> None:
    given = inputs(kind)
    _, condition, time_BGD = wan_forward.entry(
        build(kind),
        latents_BCTYX=given["hidden_states"],
        timestep=given["timestep"],
        text_BLD=given["encoder_hidden_states"],
    )
    assert time_BGD.shape == (2, runs, 128)
    assert condition.modulation_BGMD.shape == (2, runs, 6, 128)


def in_bfloat16(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """The weights as ``from_pretrained(dtype=bfloat16)`` has them: some stay float32."""
    half: WanTransformer3DModel = WanTransformer3DModel.from_config(model.config)
    half.load_state_dict(model.state_dict())
    for name, parameter in half.named_parameters():
        if not any(part in name for part in half._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    return half


def inputs_in_bfloat16(kind: str) -> dict[str, Tensor]:
    return {n: t if n == "timestep" else t.bfloat16() for n, t in inputs(kind).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_input_changes_the_output(kind: str) -> None:
    model, given = build(kind), inputs(kind)
    reference = ours(model, given)
    for name in given:
        changed = {**given, name: given[name].flip(-1)}
        assert relative(ours(model, changed), reference) > 1e-3, name


@pytest.mark.parametrize("kind", ["timestep of each frame", "timestep of each token"])
def test_the_timestep_of_one_token_changes_the_output(kind: str) -> None:
    model, given = build(kind), inputs(kind)
    reference = ours(model, given)
    given["timestep"][1, 40] += 0.5
    changed = ours(model, given)
    assert relative(changed[0], reference[0]) <= TOLERANCE, "the other sample"
    assert relative(changed[1], reference[1]) > 1e-4
    assert relative(changed, theirs(model, given)) <= TOLERANCE


@pytest.mark.parametrize(("kind", "image"), [("t2v", True), ("i2v with CLIP", False)])
def test_image_features_are_given_to_the_models_that_have_them_only(kind: str, image: bool) -> None:
    features = torch.zeros(2, 257, 24) if image else None
    given = {**inputs(kind), "encoder_hidden_states_image": features}
    with pytest.raises(AssertionError):
        ours(build(kind), given)
