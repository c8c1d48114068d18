# SPDX-License-Identifier: Apache-2.0
"""What is optimized with which settings, how gradients are clipped, what a restart brings back."""

import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastvideo.config.train import AdamW
from fastvideo.errors import UserError
from fastvideo.train import installed
from fastvideo.train.installed import check_optimizer
from fastvideo.train.optimizer import build_optimizer, clip_grad_norm
from tests.ranks import in_ranks

EIGHT_BIT = AdamW(kind="adamw_8bit", lr=1e-2)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# ---------------------------------------------------------------- groups


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=8, ffn_dim=32, num_layers=1
    )


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_weight_decay_is_for_matrices_only(kind: Any) -> None:
    model = transformer()
    spec = AdamW(kind=kind, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(model, spec)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == set(names.values())
    assert decay["blocks.0.attn1.to_q.weight"] == decay["patch_embedding.weight"] == 0.3
    for name in (
        "blocks.0.attn1.to_q.bias",
        "blocks.0.attn1.norm_q.weight",
        "blocks.0.scale_shift_table",
        "scale_shift_table",
        "blocks.0.norm2.weight",
    ):
        assert decay[name] == 0.0, name
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.95), 1e-6)


def test_what_is_frozen_is_not_optimized() -> None:
    model = transformer().requires_grad_(False)
    model.proj_out.weight.requires_grad_(True)
    optimizer = build_optimizer(model, AdamW())
    (parameter,) = (p for group in optimizer.param_groups for p in group["params"])
    assert parameter is model.proj_out.weight
    assert isinstance(optimizer, torch.optim.AdamW)


def test_spread_and_plain_weights_are_optimized_together() -> None:
    def step(rank: int, *, spread: bool) -> list[Tensor]:
        model = Mixed(spread=spread)
        optimizer = build_optimizer(model, AdamW(lr=0.1, weight_decay=0.5))
        kinds = [
            {type(parameter.data) for parameter in group["params"]}
            for group in optimizer.param_groups
        ]
        assert all(len(kind) == 1 for kind in kinds), kinds
        model(torch.arange(20.0).view(4, 5)).backward()
        optimizer.step()
        return [whole(p) for p in model.parameters()]

    expected = in_ranks(1, partial(step, spread=False))[0]
    for found in in_ranks(2, partial(step, spread=True)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- clipping


class Mixed(nn.Module):
    """A part that is spread over processes where there are several, and one that is not."""

    def __init__(self, *, spread: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spread, self.plain = nn.Linear(5, 7), nn.Linear(7, 3)
        if spread:
            fully_shard(self.spread)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.spread(x)).square().sum()  # type: ignore[no-any-return]


def clipped(max_norm: float, *, spread: bool = True) -> list[Tensor]:
    """The norm, and the gradients as they are after clipping."""
    model = Mixed(spread=spread)
    model(torch.arange(20.0).view(4, 5)).backward()
    norm = clip_grad_norm(model.parameters(), max_norm)
    assert not isinstance(norm, DTensor) and norm.shape == ()
    return [norm, *(whole(p.grad) for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_gives_torchs_numbers_bit_for_bit(max_norm: float) -> None:
    model = Mixed(spread=False)
    model(torch.arange(20.0).view(4, 5)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    expected = [norm, *(p.grad for p in model.parameters() if p.grad is not None)]
    found = clipped(max_norm, spread=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_norm_is_the_same_number_wherever_the_gradients_lie() -> None:
    expected = clipped(0.5, spread=False)
    first, second = in_ranks(2, lambda rank: clipped(0.5))
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_a_gradient_that_is_not_finite_is_seen_by_all() -> None:
    def norm(rank: int) -> Tensor:
        model = Mixed(spread=True)
        model(torch.arange(20.0).view(4, 5)).backward()
        for parameter in model.spread.parameters():
            assert isinstance(parameter.grad, DTensor)
            if rank == 1:
                parameter.grad.to_local().fill_(torch.inf)
        return clip_grad_norm(model.parameters(), 1.0)

    assert in_ranks(2, norm) == [torch.inf, torch.inf]


def test_no_gradient_is_no_norm() -> None:
    assert clip_grad_norm(nn.Linear(2, 2).parameters(), 1.0) == 0


# ---------------------------------------------------------------- steps and restarts


class Shapes(nn.Module):
    """Rows of whole blocks and others, numbers of rows that do not divide, tables and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.others = nn.Linear(256, 96), nn.Linear(96, 64)
        self.table = nn.Parameter(torch.randn(1, 16, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.others(self.rows(x + self.table.sum(1))).square().mean()  # type: ignore[no-any-return]


Training = tuple[nn.Module, torch.optim.Optimizer]


def build(spec: AdamW, *, spread: bool = False, seed: int = 0) -> Training:
    torch.manual_seed(seed)
    model = Shapes()
    if spread:
        fully_shard(model)
    return model, build_optimizer(model, spec)


def train(training: Training, steps: range) -> list[float]:
    """Make steps as the loop does: the learning rate is a number, set anew each time."""
    model, optimizer = training
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(8, 256, generator=generator))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state(training: Training) -> list[Tensor]:
    """Weights and running means, as numbers, whole."""
    model, optimizer = training
    means = [optimizer.state[p][k] for p in model.parameters() for k in ("exp_avg", "exp_avg_sq")]
    return [whole(p) for p in model.parameters()] + [whole(read(mean)) for mean in means]


def read(mean: Tensor) -> Tensor:
    if isinstance(mean, DTensor):
        local = read(mean.to_local())
        shape, stride = mean.shape, mean.stride()
        return DTensor.from_local(
            local, mean.device_mesh, mean.placements, shape=shape, stride=stride
        )
    return mean.dequantize() if hasattr(mean, "codes") else mean


def save(folder: Path, training: Training) -> None:
    model, optimizer = get_state_dict(*training, options=FLAT)
    dcp_save({"model": model, "optimizer": optimizer}, storage_writer=FileSystemWriter(folder))


def load(folder: Path, training: Training) -> None:
    model, optimizer = get_state_dict(*training, options=FLAT)
    wanted: dict[str, Any] = {"model": model, "optimizer": optimizer}
    dcp_load(wanted, storage_reader=FileSystemReader(folder))
    set_state_dict(
        *training,
        model_state_dict=wanted["model"],
        optim_state_dict=wanted["optimizer"],
        options=FLAT,
    )


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """8-bit steps as torch makes them operation by operation: seconds instead of minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("not_compiled")
def test_eight_bits_train_as_well_in_a_quarter_of_the_memory() -> None:
    whole_bits, eight_bits = build(AdamW()), build(EIGHT_BIT)
    expected, found = (train(t, range(40)) for t in (whole_bits, eight_bits))
    assert expected[-1] < 0.1 * expected[0]
    assert found[-1] == pytest.approx(expected[-1], rel=0.1)
    weight = eight_bits[0].get_parameter("rows.weight")
    means = eight_bits[1].state[weight]
    held = sum(part.nbytes for k in ("exp_avg", "exp_avg_sq") for part in parts(means[k]))
    assert held < 0.26 * 8 * weight.numel()


def parts(mean: Any) -> list[Tensor]:
    return [mean.codes, mean.scale]


@pytest.mark.usefixtures("not_compiled")
def test_the_learning_rate_stays_a_number_and_counts() -> None:
    training = build(EIGHT_BIT)
    assert [group["lr"] for group in training[1].param_groups] == [1e-2, 1e-2]
    train(training, range(1))
    before = [whole(p) for p in training[0].parameters()]
    for group in training[1].param_groups:
        group["lr"] = 0.0
    training[0](torch.ones(1, 256)).backward()
    training[1].step()
    assert all(torch.equal(a, b) for a, b in zip(before, training[0].parameters(), strict=True))
    assert [group["lr"] for group in training[1].param_groups] == [0.0, 0.0]


@pytest.mark.usefixtures("not_compiled")
def test_eight_bits_of_a_snapshot_do_not_change_with_the_training() -> None:
    training = build(EIGHT_BIT)
    train(training, range(1))
    means = [s["exp_avg"] for s in training[1].state.values() if hasattr(s["exp_avg"], "codes")]
    assert len(means) == 2
    for copy in (lambda t: t.detach().to("cpu", copy=True), Tensor.clone):
        before = [copy(mean) for mean in means]
        expected = [mean.dequantize() for mean in means]
        train(training, range(1, 2))
        for snapshot, value, mean in zip(before, expected, means, strict=True):
            assert torch.equal(snapshot.dequantize(), value)
            assert not torch.equal(mean.dequantize(), value)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_restart_continues_bit_for_bit_in_the_same_and_any_other_layout(
    kind: Any, tmp_path: Path
) -> None:
    spec = AdamW(kind=kind, lr=1e-2)

    def start(rank: int, count: int) -> list[Tensor]:
        training = build(spec, spread=count > 1)
        train(training, range(3))
        save(tmp_path / str(count), training)
        saved = state(training)
        train(training, range(3, 5))
        return [*saved, *state(training)]

    def resume(rank: int, count: int, saved_by: int) -> list[Tensor]:
        training = build(spec, spread=count > 1, seed=1)
        load(tmp_path / str(saved_by), training)
        saved = state(training)
        train(training, range(3, 5))
        return [*saved, *state(training)]

    counts = (1, 2, 3)
    expected = {count: in_ranks(count, partial(start, count=count))[0] for count in counts}
    for saved_by, count in [(1, 1), (2, 2), (1, 3), (3, 2), (2, 1)]:
        found = in_ranks(count, partial(resume, count=count, saved_by=saved_by))[0]
        pairs = list(zip(found, expected[saved_by], strict=True))
        if count != saved_by:
            pairs = pairs[: len(pairs) // 2]  # what follows adds up in another order
        assert all(torch.equal(a, b) for a, b in pairs), (saved_by, count)


def test_compiled_steps_of_shared_weights_are_those_of_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # for one kernel

    def steps(rank: int, *, spread: bool) -> list[Tensor]:
        model = nn.Linear(8192, 1, bias=False)  # of two processes one holds its only row
        nn.init.constant_(model.weight, 0.1)
        if spread:
            fully_shard(model)
        else:
            torch.compiler.set_stance("force_eager")
        optimizer = build_optimizer(model, EIGHT_BIT)
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(8, 8192, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return state((model, optimizer))

    expected = in_ranks(1, partial(steps, spread=False))[0]
    for _ in ("maybe compiled here", "from the cache that all processes share"):
        for found in in_ranks(2, partial(steps, spread=True)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- what is installed


def test_what_is_installed_is_not_refused() -> None:
    for kind in ("adamw", "adamw_8bit"):
        check_optimizer(AdamW(kind=kind), device="cpu")


def test_a_missing_torchao_is_told_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"optimizer\.kind=adamw_8bit.*pip install .*low-bit"):
        check_optimizer(EIGHT_BIT, device="cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_a_missing_compiler_is_told(
    device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"adamw_8bit.*compiler.*apt-get install"):
        check_optimizer(EIGHT_BIT, device=device)


def test_missing_headers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"adamw_8bit.*headers.*python3-dev"):
        check_optimizer(EIGHT_BIT, device="cpu")


@pytest.mark.parametrize(("device", "why"), [("cpu", "CUDA GPUs only"), ("auto", "not installed")])
def test_apex_is_refused_where_it_cannot_run(device: str, why: str) -> None:
    with pytest.raises(UserError, match=f"optimizer\\.kind=apex_adamw.*{why}"):
        check_optimizer(AdamW(kind="apex_adamw"), device=device)
    with pytest.raises(UserError, match="whole weights on a GPU"):
        build_optimizer(nn.Linear(2, 2), AdamW(kind="apex_adamw"))
