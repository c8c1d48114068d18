# SPDX-License-Identifier: Apache-2.0
"""The fine attention's CUDA kernels, run by the emulator, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.ops.conftest import Emulator
from tests.unit.ops.fine_cases import GRADIENTS, Case, Inputs, error, expected, make

FULL = (64, 64, 64)
RAGGED = (64, 33, 16, 1)
CASES = [
    Case(FULL),
    Case(FULL, head_dim=128, dtype=torch.float16),
    Case(RAGGED, k=3, head_dim=128, tokens_first=True, heads=2),
    Case(RAGGED, k=3, dtype=torch.float16, padded=True, gap=3),
    Case((17,), k=1),
    Case((48, 64), (5, 64, 17, 40, 64), k=4, batch=2, heads=2, counts=(0, 1, 4, 2)),
    Case((64, 31), (20, 64, 64), k=3, head_dim=128, coarse=False, gate=False, batch=2),
    Case((64, 31), k=2, gate=False, tokens_first=True, counts=(2, 0)),
    # More tiles than the lanes of a warp look up at a time.
    Case((16,), (16,) * 40, k=37),
]
TOLERANCE = 1e-2

Run = tuple[Tensor, ...]


def run(emulator: Emulator, inputs: Inputs) -> dict[str, Tensor]:
    """Forward and backward; what they allocate holds NaN before."""
    poison(inputs)
    out, lse = emulator.ops.vsa_fine_forward(*inputs.forward())
    poison(inputs)
    gradients = emulator.ops.vsa_fine_backward(*inputs.backward(out, lse))
    return {"out": out, "lse": lse, **dict(zip(GRADIENTS, gradients, strict=True))}


def poison(inputs: Inputs) -> None:
    """Leave NaN in freed memory, of the sizes that results will have."""
    for tensor in (inputs.q_BHSD, inputs.k_BHND, inputs.v_BHND, inputs.coarse_BHQD):
        if tensor is not None:
            kept = [torch.full_like(tensor, float("nan")) for _ in range(4)]
            del kept


@pytest.fixture(params=["mma", "wgmma"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels run."""
    name: str = request.param
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", name)
    return name


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_those_of_float64(
    emulator: Emulator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(case)
    monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", "7")
    got, want = run(emulator, inputs), expected(inputs)
    torch.testing.assert_close(got["lse"].double(), want["lse"], rtol=1e-5, atol=1e-4)
    for name in ("out", *GRADIENTS):
        if name not in want:
            assert got[name].shape == (0,), name
            continue
        assert error(got[name], want[name]) <= TOLERANCE, name
        # Padding is 0, and where nothing depends on an input so is its gradient.
        assert not got[name].double()[want[name] == 0].any(), name
    for name, tensor in (("out", inputs.q_BHSD), ("dq", inputs.q_BHSD), ("dk", inputs.k_BHND)):
        assert got[name].stride() == torch.empty_like(tensor).stride()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_order_of_execution_changes_a_bit(
    emulator: Emulator, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(Case((64, 30), (64, 64, 7, 50), k=3, head_dim=head_dim))
    first = run(emulator, inputs)
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", seed)
        for name, tensor in run(emulator, inputs).items():
            assert torch.equal(tensor, first[name]), (seed, name)


def sixteens(tokens: int) -> int:
    return -(-tokens // 16) * 16


def pairs(inputs: Inputs) -> int:
    """Products of tokens that the chosen tiles hold, each side rounded up to 16."""
    total = 0
    for lists in inputs.index_BHQk.flatten(0, 1).tolist():
        for (_, rows), chosen in zip(inputs.q_tiles.tolist(), lists, strict=True):
            columns = sum(sixteens(int(inputs.kv_tiles[i, 1])) for i in chosen)
            total += sixteens(rows) * columns
    return total


def test_ragged_tiles_cost_what_they_hold(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", "mma")
    inputs = make(Case((64, 33, 16, 1), (64, 20, 48), k=2, heads=2))
    product = 2 * inputs.q_BHSD.shape[-1] * pairs(inputs)
    out, lse = emulator.ops.vsa_fine_forward(*inputs.forward())
    assert emulator.count("tensor_core_flops") == 2 * product
    emulator.reset_counters()
    emulator.ops.vsa_fine_backward(*inputs.backward(out, lse))
    # Three products for the gradient of queries, four for those of keys and values.
    assert emulator.count("tensor_core_flops") == 7 * product


@pytest.mark.parametrize(("head_dim", "forward", "backward"), [(64, 4, 4), (128, 3, 2)])
def test_shared_memory_lets_several_blocks_run_on_an_a100(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, head_dim: int, forward: int, backward: int
) -> None:
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", "mma")
    inputs = make(Case((16,), k=1, head_dim=head_dim))
    out, lse = emulator.ops.vsa_fine_forward(*inputs.forward())
    # 164 KiB a multiprocessor, of which each block takes 1 KiB besides its own.
    assert forward * (emulator.count("largest_shared_bytes") + 1024) <= 164 * 1024
    emulator.ops.vsa_fine_backward(*inputs.backward(out, lse))
    assert backward * (emulator.count("largest_shared_bytes") + 1024) <= 164 * 1024


@pytest.mark.usefixtures("kernel")
def test_rows_that_are_not_aligned_are_copied(emulator: Emulator) -> None:
    inputs = make(Case((64, 20), gate=False, coarse=False))
    shape = inputs.q_BHSD.shape
    odd = torch.empty(*shape[:3], shape[3] + 1, dtype=inputs.q_BHSD.dtype)[..., 1:]
    odd.copy_(inputs.q_BHSD)
    assert odd.stride(2) % 8
    want = emulator.ops.vsa_fine_forward(*inputs.forward())
    got = emulator.ops.vsa_fine_forward(odd, *inputs.forward()[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("kernel")
def test_values_out_of_range_are_brought_into_it(emulator: Emulator) -> None:
    inputs = make(Case((64, 20, 64), k=2, counts=(2, 1)))
    out, lse = emulator.ops.vsa_fine_forward(*inputs.forward())
    assert inputs.counts_BHQ is not None
    index, counts = inputs.index_BHQk.clone(), inputs.counts_BHQ.clone()
    index[0, 0, 0] = torch.tensor([-5, 1 << 30], dtype=torch.int32)
    counts[0, 0, 1] = 1 << 30
    tiles = torch.tensor([[-9, 1 << 30], [1 << 30, -1], [84, 64]], dtype=torch.int32)
    hostile = list(inputs.backward(out, lse))
    hostile[6:12] = [index, counts, inputs.offsets - 77, inputs.rows + 1000, tiles, tiles]
    emulator.ops.vsa_fine_backward(*hostile)
    forward: list[Any] = list(inputs.forward())
    forward[3:7] = [index, counts, tiles, tiles]
    emulator.ops.vsa_fine_forward(*forward)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [*(t.float() for t in x[:3]), *x[3:7], None, None], "q is float32, expected"),
        (lambda x: [*(t[..., :32] for t in x[:3]), *x[3:7], None, None], "32 channels in a head"),
        (lambda x: [x[0], x[1][:, :, :-1], *x[2:]], r"v has shape \(1, 1, 84, 64\), expected"),
        (lambda x: [*x[:3], x[3].long(), *x[4:]], "index is int64, expected int32"),
    ],
)
def test_a_wrong_argument_is_named(
    emulator: Emulator, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    arguments = change(list(make(Case((64, 20))).forward()))
    with pytest.raises(RuntimeError, match=message):
        emulator.ops.vsa_fine_forward(*arguments)


def test_an_impossible_choice_of_kernels_is_an_error(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make(Case((16,), k=1)).forward()
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", "fast")
    with pytest.raises(RuntimeError, match="FASTVIDEO_VSA_KERNEL=fast: use auto, mma or wgmma"):
        emulator.ops.vsa_fine_forward(*arguments)
