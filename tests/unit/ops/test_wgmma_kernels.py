# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of the fine attention, run by the emulator, and their instructions."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.ops.conftest import Emulator
from tests.unit.ops.fine_cases import GRADIENTS, Case, Inputs, error, expected, make, replace

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = 1e-2
SEEDS = (0, 1, 2)
CSRC = Path(__file__).parents[3] / "csrc"
FORMATS = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
MISTAKES = {
    "no wait for copies": None,
    "no wait for product": None,
    "no fence of proxy": None,
    "overwrites a": None,
    "no commit": None,
    "no fence of registers": "no wgmma.fence",
    "too many bytes": "deadlock",
}
"""Each with the error that tells of it, or None where the results are wrong instead."""

# ---- the layer ---------------------------------------------------------------------------------


def call(emulator: Emulator, name: str, *arguments: object) -> None:
    """Run a probe; an error of the emulator becomes a RuntimeError."""
    function = getattr(emulator.library, f"fastvideo_emulator_{name}")
    function.restype = ctypes.c_char_p
    pointers = [
        ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else one for one in arguments
    ]
    message = function(*pointers)
    if message:
        raise RuntimeError(message.decode())


def product(
    emulator: Emulator,
    columns: int,
    dtype: torch.dtype,
    *,
    rows: bool,
    registers: bool,
    mistake: str,
) -> tuple[Tensor, Tensor]:
    """Return what a warpgroup multiplied and what it should be."""
    generator = torch.Generator().manual_seed(columns)
    a = torch.randn(64, 64, generator=generator).to(dtype)
    b = torch.randn(64, columns, generator=generator).to(dtype)
    stored = b if rows else b.T.contiguous()
    out = torch.zeros(64, columns)
    flags = (columns, dtype == BF16, rows, registers, mistake.encode())
    call(emulator, "wgmma", a, stored, out, *flags)
    return out, a.float() @ b.float()


@FORMATS
@pytest.mark.parametrize("registers", [False, True], ids=["a in shared", "a in registers"])
@pytest.mark.parametrize(
    ("columns", "rows"),
    [*((n, False) for n in (16, 32, 48, 64)), *((n, True) for n in (16, 32, 48, 64, 128))],
    ids=lambda value: ("k-major", "mn-major")[value] if isinstance(value, bool) else str(value),
)
def test_a_product_of_a_warpgroup_is_that_of_matrices(
    emulator: Emulator, columns: int, rows: bool, registers: bool, dtype: torch.dtype
) -> None:
    emulator.reset_counters()
    got, want = product(emulator, columns, dtype, rows=rows, registers=registers, mistake="")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert emulator.count("tensor_core_flops") == 2 * 64 * 64 * columns


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.items())
def test_a_mistake_with_products_or_copies_shows(
    emulator: Emulator, mistake: str, message: str | None
) -> None:
    registers = mistake == "overwrites a"
    if message is not None:
        with pytest.raises(RuntimeError, match=message):
            product(emulator, 64, BF16, rows=True, registers=registers, mistake=mistake)
        return
    got, want = product(emulator, 64, BF16, rows=True, registers=registers, mistake=mistake)
    if mistake == "no fence of proxy":
        # The kernel zeroes rows of A: what wgmma sees of that without the fence is nothing.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    else:
        assert not torch.allclose(got, want, atol=0.1)


@pytest.mark.parametrize(("channel", "token"), [(0, 0), (64, 5), (64, 90), (0, -3), (32, 99)])
def test_a_box_lies_swizzled_and_holds_zeros_beyond_the_tensor(
    emulator: Emulator, channel: int, token: int
) -> None:
    tensor = torch.arange(100 * 128, dtype=torch.int16).view(100, 128)
    out = torch.zeros(16, 64, dtype=torch.int16)
    call(
        emulator,
        "copy_box",
        tensor,
        ctypes.c_int64(100),
        ctypes.c_int64(128),
        channel,
        token,
        16,
        out,
    )
    padded = torch.zeros(140, 256, dtype=torch.int16)
    padded[20:120, :128] = tensor
    want = padded[20 + token : 36 + token, channel : channel + 64].view(16, 8, 8)
    swizzled = torch.stack([want[row][torch.arange(8) ^ row % 8] for row in range(16)])
    assert torch.equal(out, swizzled.view(16, 64))


def test_an_mbarrier_ends_phases_by_arrivals(emulator: Emulator) -> None:
    out = torch.zeros(2, 5)
    call(emulator, "arrivals", out, 0)
    want = torch.arange(5.0) * 10
    assert torch.equal(out, torch.stack([want + 1, want]))
    with pytest.raises(RuntimeError, match=r"deadlock|more arrivals"):
        call(emulator, "arrivals", out, 1)


# ---- the kernels -------------------------------------------------------------------------------

WHOLE, RAGGED = (64, 64, 64, 64, 64), (64, 33, 1, 48, 16, 63, 17)
CASES = [
    Case(RAGGED, k=3, coarse=False, gate=False),
    Case(RAGGED, k=4, head_dim=128, counts=(4, 0, 2, 1)),
    Case(RAGGED, k=7, dtype=FP16, padded=True, gap=3, gate=False),
    Case((7,), k=1, head_dim=128, dtype=FP16),
    Case(WHOLE, k=3, head_dim=128, tokens_first=True, heads=2),
    Case((64, 20, 64), (64, 64, 40, 9, 64), k=3, batch=2, heads=2, tokens_first=True, padded=True),
    Case((64, 50), (30,), k=1, head_dim=128, counts=(1, 0)),
]


def run(emulator: Emulator, inputs: Inputs) -> dict[str, Tensor]:
    """Return every result of forward and backward."""
    out, lse = emulator.ops.vsa_fine_forward(*inputs.forward())
    gradients = emulator.ops.vsa_fine_backward(*inputs.backward(out, lse))
    return {"out": out, "lse": lse} | dict(zip(GRADIENTS, gradients, strict=True))


@pytest.fixture
def wgmma(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    monkeypatch.setenv("FASTVIDEO_VSA_KERNEL", "wgmma")
    return emulator


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_are_those_of_float64(wgmma: Emulator, case: Case) -> None:
    inputs = make(case)
    got, want = run(wgmma, inputs), expected(inputs)
    finite = want["lse"].isfinite()
    assert torch.equal(got["lse"].isfinite(), finite)
    torch.testing.assert_close(got["lse"].double()[finite], want["lse"][finite], rtol=0, atol=2e-2)
    for name in want.keys() - {"lse"}:
        assert got[name].isfinite().all(), name
        assert error(got[name], want[name]) < TOLERANCE, name
        # Padding, rows without tiles and tiles that no one chose: nothing at all.
        if name != "out":
            assert not got[name][want[name] == 0].any(), name


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_order_of_execution_changes_no_bit(
    wgmma: Emulator, monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    inputs = make(Case(RAGGED, k=4, head_dim=head_dim, counts=(4, 1, 3, 0), padded=True))
    results = []
    for seed in SEEDS:
        monkeypatch.setenv("FASTVIDEO_EMULATOR_SEED", str(seed))
        results.append(run(wgmma, inputs))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_neighbours_that_choose_the_same_tiles_load_them_once(wgmma: Emulator) -> None:
    inputs = make(Case((64,) * 6, k=4, coarse=False, gate=False))
    same = inputs.index_BHQk[:, :, :1].expand_as(inputs.index_BHQk).contiguous()
    wgmma.reset_counters()
    wgmma.ops.vsa_fine_forward(*replace(inputs, index_BHQk=same).forward())
    tile = 64 * 64 * 2
    # Two blocks of three query tiles each: four key tiles and their values.
    assert wgmma.count("async_bytes") == 2 * 4 * 2 * tile
    assert wgmma.count("tensor_core_flops") == 6 * 4 * 4 * 64 * 64 * 64


def test_ragged_tiles_cost_the_sixteens_they_hold(wgmma: Emulator) -> None:
    inputs = make(Case((64,), (20, 64, 16), k=3, coarse=False, gate=False))
    wgmma.reset_counters()
    wgmma.ops.vsa_fine_forward(*inputs.forward())
    assert wgmma.count("tensor_core_flops") == 4 * 64 * 64 * (32 + 64 + 16)
    assert wgmma.count("async_bytes") == (32 + 64 + 16) * 64 * 2 * 2


def test_lists_in_any_order_and_entries_out_of_range_do_no_harm(wgmma: Emulator) -> None:
    inputs = make(Case(WHOLE, k=3, coarse=False, gate=False))
    turned = replace(inputs, index_BHQk=inputs.index_BHQk.flip(-1).contiguous())
    out, _ = wgmma.ops.vsa_fine_forward(*turned.forward())
    assert error(out, expected(inputs)["out"]) < TOLERANCE
    hostile = torch.full_like(inputs.index_BHQk, 1 << 30)
    hostile[..., 1], hostile[..., 2] = -5, 2
    out, _ = wgmma.ops.vsa_fine_forward(*replace(inputs, index_BHQk=hostile).forward())
    assert out.isfinite().all()


def test_keys_that_heads_share_by_a_stride_of_0_are_copied(wgmma: Emulator) -> None:
    inputs = make(Case(RAGGED, k=3, heads=2, coarse=False, gate=False))
    shared = replace(inputs, k_BHND=inputs.k_BHND[:, :1].expand(-1, 2, -1, -1))
    out, _ = wgmma.ops.vsa_fine_forward(*shared.forward())
    assert error(out, expected(shared)["out"]) < TOLERANCE
