# SPDX-License-Identifier: Apache-2.0
"""Tests of csrc/vsa on the CPU: the operators against torch in float64, and what they refuse."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastvideo import ops
from fastvideo.ops import Tiles, library
from fastvideo.ops.library import operators
from tests.unit.ops import vsa_cpu_cases as cases
from tests.unit.ops.vsa_cpu_cases import Case, Inputs

ROOT = Path(__file__).parents[3]
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


@pytest.mark.parametrize("case", cases.every_case(), ids=str)
def test_fine_attention_is_that_of_float64(case: Case) -> None:
    cases.check(case)


# What the other tests took is the best that this processor has.
LESSER_ISAS = ISAS[: ISAS.index(library.cpu_isa())] or ISAS[:1]


@pytest.mark.parametrize("isa", LESSER_ISAS)
def test_every_instruction_set_computes_the_same(isa: str) -> None:
    assert run_cases({"FASTVIDEO_CPU_ISA": isa}).splitlines() == [isa]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", ["avx2", "wide"])
def test_sanitizers_find_nothing(variant: str, tmp_path: Path) -> None:
    if variant == "avx2" and library.cpu_isa() == "generic":
        pytest.skip("this processor has no AVX2")
    build = [sys.executable, "setup.py", "build_checked"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    # libstdc++ too, or the sanitizer does not find what throws exceptions.
    found = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    # Leaks would be those of Python itself.
    options = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    # A copy of the package with that library in it: a process can load one only.
    ignored = shutil.ignore_patterns("_C.so", "__pycache__")
    shutil.copytree(ROOT / "fastvideo", tmp_path / "fastvideo", ignore=ignored)
    (tmp_path / "fastvideo" / "_C.so").symlink_to(ROOT / "build" / "checked" / f"{variant}.so")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    run_cases(options, folder=tmp_path)
    some = "test_kernels_equal_their_references and (130 or 600)"
    norms = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/unit/ops/test_norm.py",
        "-k",
        some,
    ]
    run_python(options, tmp_path, norms)


def run_cases(environment: dict[str, str], folder: Path = ROOT) -> str:
    """Run every case in a process of its own."""
    return run_python(environment, folder, ["-m", "tests.unit.ops.vsa_cpu_cases"])


def run_python(environment: dict[str, str], folder: Path, arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    case = Case(
        dtype=dtype, q_sizes=(64, 9) * 6, kv_sizes=(64, 31, 64) * 3, k=5, heads=3, channels=80
    )
    inputs = cases.make_inputs(case)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5, 2):
            torch.set_num_threads(num_threads)
            results.append(cases.run(inputs))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


def test_many_heads_take_turns_in_memory() -> None:
    # Packed, they are several times what is kept in memory at once.
    sizes = (5,) * 20
    cases.check(Case(q_sizes=sizes, kv_sizes=sizes, k=2, batch=2, heads=13, channels=64))


def test_results_keep_the_layout_of_the_inputs() -> None:
    inputs = cases.make_inputs(Case(channels=16))
    out, _, dq, dk, dv, _, dgate = cases.run(inputs)
    assert out.stride() == dq.stride() == dgate.stride() == inputs.q.stride()
    assert dk.stride() == dv.stride() == inputs.k.stride()


def test_inputs_may_have_any_strides() -> None:
    inputs = cases.make_inputs(Case(channels=16))

    def sparse_rows(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT

    other = replace(
        inputs,
        **{name: sparse_rows(getattr(inputs, name)) for name in ("q", "k", "v", "gate", "coarse")},
        grad=inputs.grad[:, :, :1].expand_as(inputs.grad),
        index=inputs.index.mT.contiguous().mT,
        q_tiles=torch.cat([inputs.q_tiles, inputs.q_tiles], dim=1)[:, :2],
    )
    dense = replace(inputs, grad=other.grad.contiguous())
    results = cases.run(other)
    for ours, theirs in zip(results, cases.run(dense), strict=True):
        assert torch.equal(ours, theirs)
    assert results[0].stride() == library.empty_rows_like(other.q).stride()
    assert results[3].stride() == library.empty_rows_like(other.k).stride()


def test_work_is_that_of_tokens_not_of_slots() -> None:
    """81 frames at 480x832 have 32,760 tokens, and 39,936 slots in padded tiles."""
    tiles = Tiles.from_geometry(21, 30, 52)
    assert (tiles.num_tokens, 64 * tiles.num_tiles) == (32760, 39936)
    q, k, v = (torch.randn(1, 1, tiles.num_tokens, 16) for _ in range(3))
    # Each tile attends to a twelfth of all, so that each is attended to by a twelfth.
    step = torch.arange(0, tiles.num_tiles, 12, dtype=torch.int32)
    shift = torch.arange(tiles.num_tiles, dtype=torch.int32)[:, None]
    index = ((step + shift) % tiles.num_tiles).sort(dim=1).values[None, None]
    with FlopCounterMode(display=False) as counter:
        operators().vsa_fine_forward(q, k, v, index, None, tiles.table, tiles.table, None, None)
    of_slots = 4 * 16 * 39936 * 39936 / 12
    of_tokens = 4 * 16 * 32760 * 32760 / 12
    assert counter.get_total_flops() == pytest.approx(of_tokens, rel=0.1)
    assert counter.get_total_flops() < 0.75 * of_slots


def test_pool_is_the_mean_of_each_tile() -> None:
    for dtype in cases.DTYPES:
        for channels in (5, 64):
            inputs = cases.make_inputs(
                Case(dtype=dtype, channels=channels, q_sizes=(64, 1, 37), padding=2)
            )
            cases.poison(torch.empty(1, 2, 3, channels))
            means = operators().vsa_pool(inputs.q, inputs.q_tiles)
            for i, (first, size) in enumerate(inputs.q_tiles.tolist()):
                wanted = inputs.q[:, :, first : first + size].double().mean(dim=2)
                torch.testing.assert_close(means[:, :, i].double(), wanted, rtol=0, atol=1e-6)


def test_pool_backward_shares_out_gradients_and_writes_all_rows() -> None:
    tiles = torch.tensor([[2, 64], [70, 1], [71, 20]], dtype=torch.int32)
    grad = torch.randn(2, 3, 3, 20)
    for dtype in cases.DTYPES:
        cases.poison(torch.empty((2, 3, 100, 20), dtype=dtype))
        found = operators().vsa_pool_backward(grad, tiles, 100, dtype)
        wanted = torch.zeros(2, 3, 100, 20)
        for i, (first, size) in enumerate(tiles.tolist()):
            wanted[:, :, first : first + size] = grad[:, :, i : i + 1] / size
        torch.testing.assert_close(found, wanted.to(dtype))


def test_topk_takes_the_lowest_of_equal_tiles_and_nan_last() -> None:
    nan, inf = torch.nan, torch.inf
    rows = [[1, 3, 3, 2, 3], [nan, 0.0, -0.0, nan, -inf], [nan] * 5, [inf, nan, inf, -1, inf]]
    scores = torch.tensor(rows).reshape(1, 1, 4, 5)
    wanted = {
        1: [[1], [1], [0], [0]],
        2: [[1, 2], [1, 2], [0, 1], [0, 2]],
        3: [[1, 2, 4], [1, 2, 4], [0, 1, 2], [0, 2, 4]],
        4: [[1, 2, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3], [0, 2, 3, 4]],
    }
    for k, index in wanted.items():
        assert operators().vsa_topk(scores, k)[0, 0].tolist() == index


def test_topk_of_random_scores_is_torchs() -> None:
    scores = torch.randn(2, 3, 70, 300)
    wanted = scores.topk(31, dim=3).indices.sort(dim=3).values
    assert torch.equal(operators().vsa_topk(scores, 31), wanted.int())


def test_maps_lists_and_inverses_agree() -> None:
    block_map = torch.rand(2, 3, 9, 14) < 0.3
    block_map[0, 0, 4] = False
    index, counts = operators().vsa_map_to_index(block_map)
    offsets, rows = operators().vsa_invert(index, counts, 14)
    for place in ((b, h) for b in range(2) for h in range(3)):
        for q_tile in range(9):
            chosen = block_map[place][q_tile].nonzero().flatten().tolist()
            assert index[place][q_tile].tolist() == chosen + [0] * (14 - len(chosen))
            assert counts[place][q_tile] == len(chosen)
        for kv_tile in range(14):
            start, end = offsets[place][kv_tile : kv_tile + 2].tolist()
            chose = block_map[place][:, kv_tile].nonzero().flatten().tolist()
            assert rows[place][start:end].tolist() == chose
    index = operators().vsa_topk(torch.randn(1, 1, 9, 14), 4)
    offsets, rows = operators().vsa_invert(index, None, 14)
    assert offsets[0, 0, -1] == rows.shape[2] == 36


def test_tiles_chosen_twice_do_not_crash() -> None:
    inputs = cases.make_inputs(Case(k=3))
    for found in cases.run(replace(inputs, index=torch.zeros_like(inputs.index))):
        assert not found.isnan().any()


def forward(**changes: Any) -> Callable[[], Any]:
    """A call of vsa_fine_forward with some arguments replaced."""
    inputs = replace(cases.make_inputs(Case(k=3, counts=True)), **changes)
    return lambda: operators().vsa_fine_forward(*inputs.forward)


def backward(**changes: Any) -> Callable[[], Any]:
    """A call of vsa_fine_backward with some arguments replaced."""
    inputs: Inputs = cases.make_inputs(Case(k=3, counts=True))
    out, lse = operators().vsa_fine_forward(*inputs.forward)
    offsets, rows = operators().vsa_invert(inputs.index, inputs.counts, 3)
    arguments = {
        "grad": inputs.grad,
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "out": out,
        "lse": lse,
        "index": inputs.index,
        "counts": inputs.counts,
        "offsets": offsets,
        "rows": rows,
        "q_tiles": inputs.q_tiles,
        "kv_tiles": inputs.kv_tiles,
        "coarse": inputs.coarse,
        "gate": inputs.gate,
    }
    return lambda: operators().vsa_fine_backward(*(arguments | changes).values())


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


X = torch.randn(1, 2, 97, 64)
KEYS = torch.randn(1, 2, 112, 64)
TILES = ints([0, 64], [64, 33])
INDEX = torch.zeros(1, 2, 2, 3, dtype=torch.int32)
COUNTS = torch.zeros(1, 2, 2, dtype=torch.int32)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "pool axes": (lambda: operators().vsa_pool(X[0], TILES), "x has shape (2, 97, 64)"),
    "pool empty": (lambda: operators().vsa_pool(X[:, :0], TILES), "x has shape (1, 0, 97, 64)"),
    "pool dtype": (lambda: operators().vsa_pool(X.double(), TILES), "x is float64"),
    "pool channels": (lambda: operators().vsa_pool(X.repeat(1, 1, 1, 5), TILES), "x has 320"),
    "table dtype": (lambda: operators().vsa_pool(X, TILES.long()), "tiles is int64"),
    "table shape": (lambda: operators().vsa_pool(X, TILES[:, :1]), "tiles has shape (2, 1)"),
    "table empty": (lambda: operators().vsa_pool(X, TILES[:0]), "tiles has shape (0, 2)"),
    "tile empty": (lambda: operators().vsa_pool(X, ints([0, 0])), "tiles[0] has 0 tokens"),
    "tile big": (lambda: operators().vsa_pool(X, ints([0, 65])), "tiles[0] has 65 tokens"),
    "tile before": (lambda: operators().vsa_pool(X, ints([-1, 3])), "tiles[0] begins at token -1"),
    "tile behind": (
        lambda: operators().vsa_pool(X, ints([90, 8])),
        "tiles[0] ends before token 98",
    ),
    "tile far": (lambda: operators().vsa_pool(X, ints([2**31 - 1, 64])), "tiles[0] ends before"),
    "overlap": (
        lambda: operators().vsa_pool(X, ints([0, 5], [4, 5])),
        "tiles[1] begins at token 4",
    ),
    "pooled dtype": (
        lambda: operators().vsa_pool_backward(X.half(), TILES, 97, torch.half),
        "grad is float16",
    ),
    "pooled tiles": (
        lambda: operators().vsa_pool_backward(X, TILES, 97, torch.half),
        "grad has shape (1, 2, 97, 64), expected (*, *, 2, *)",
    ),
    "pooled tokens": (
        lambda: operators().vsa_pool_backward(X[:, :, :2], TILES, 96, torch.half),
        "tiles[1] ends before token 97",
    ),
    "pooled result": (
        lambda: operators().vsa_pool_backward(X[:, :, :2], TILES, 97, torch.int32),
        "dtype is int32",
    ),
    "k 0": (lambda: operators().vsa_topk(X, 0), "k is 0, expected 1 to 64"),
    "k 65": (lambda: operators().vsa_topk(X, 65), "k is 65, expected 1 to 64"),
    "scores": (lambda: operators().vsa_topk(X.bfloat16(), 1), "scores is bfloat16"),
    "map": (lambda: operators().vsa_map_to_index(X), "block_map is float32, expected bool"),
    "inverse of none": (lambda: operators().vsa_invert(INDEX, None, 0), "num_kv_tiles is 0"),
    "inverse out of range": (lambda: operators().vsa_invert(INDEX + 3, None, 3), "index holds 3"),
    "inverse counts": (lambda: operators().vsa_invert(INDEX, COUNTS + 4, 3), "counts holds 4"),
    "k axes": (forward(k=KEYS[:, :1]), "k has shape (1, 1, 112, 64), expected (1, 2, *, 64)"),
    "k dtype": (forward(k=KEYS.half()), "k is float16, expected float32"),
    "v tokens": (forward(v=KEYS[:, :, :9]), "v has shape (1, 2, 9, 64)"),
    "index tiles": (forward(index=INDEX[:, :, :1]), "index has shape (1, 2, 1, 3)"),
    "index dtype": (forward(index=INDEX.long()), "index is int64"),
    "index width": (forward(index=INDEX.repeat(1, 1, 1, 2)), "index has shape (1, 2, 2, 6)"),
    "index low": (forward(index=INDEX - 1, counts=None), "index holds -1, expected 0 to 2"),
    "index high": (forward(index=INDEX + 3, counts=None), "index holds 3, expected 0 to 2"),
    "counts low": (forward(counts=COUNTS - 1), "counts holds -1, expected 0 to 3"),
    "counts shape": (forward(counts=COUNTS[0]), "counts has shape (2, 2)"),
    "q table": (forward(q_tiles=ints([0, 64], [64, 34])), "q_tiles[1] ends before token 98"),
    "kv table": (forward(kv_tiles=ints([0, 64], [1, 3], [9, 3])), "kv_tiles[1] begins at token 1"),
    "coarse": (forward(coarse=X), "coarse has shape (1, 2, 97, 64), expected (1, 2, 2, 64)"),
    "coarse dtype": (forward(coarse=X[:, :, :2].half()), "coarse is float16, expected float32"),
    "gate": (forward(gate=X.half()), "gate is float16, expected float32"),
    "gate alone": (forward(coarse=None), "gate is given without coarse"),
    "grad": (backward(grad=X[:, :, :9]), "grad has shape (1, 2, 9, 64)"),
    "out": (backward(out=X.half()), "out is float16"),
    "lse": (backward(lse=X), "lse has shape (1, 2, 97, 64), expected (1, 2, 97)"),
    "offsets": (backward(offsets=ints([[1, 1, 1, 1]] * 2)[None, 0]), "offsets begins with 1"),
    "offsets fall": (
        backward(offsets=ints([[0, 3, 1, 3]] * 2)[None, 0]),
        "offsets holds 1 after 3",
    ),
    "offsets far": (backward(offsets=ints([[0, 3, 3, 7]] * 2)[None, 0]), "offsets holds 7"),
    "offsets shape": (backward(offsets=COUNTS), "offsets has shape (1, 2, 2), expected (1, 2, 4)"),
    "rows shape": (backward(rows=COUNTS), "rows has shape (1, 2, 2), expected (1, 2, 6)"),
    "rows": (
        backward(rows=torch.full((1, 2, 6), 2, dtype=torch.int32)),
        "rows holds 2, expected 0 to 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_names_the_argument(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        call()
    assert message in str(error.value)


STRANGE = {
    "rows that overlap": lambda x: x[0, 0, :, 0].unfold(0, x.shape[3], 1)[None, None, :129],
    "heads that are one": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "tokens that are one": lambda x: x[:, :, :1].expand(-1, -1, 200, -1),
    "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a view that begins anywhere": lambda x: x.flatten()[1:24001].view(1, 2, 200, 60),
}


@pytest.mark.parametrize("layout", STRANGE)
def test_what_lies_strangely_in_memory_gives_the_same(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, 2, 256, 64, generator=generator) for _ in range(4)]
    strange = [STRANGE[layout](x) for x in tokens]
    plain = [x.contiguous() for x in strange]
    num_tokens = strange[0].shape[2]
    firsts = torch.arange(0, num_tokens, 50, dtype=torch.int32)
    table = torch.stack((firsts, (num_tokens - firsts).clamp(max=50)), dim=1)
    tiles = Tiles(table, num_tokens)
    results = []
    for inputs in (strange, plain):
        leaves = [x.detach().requires_grad_() for x in inputs]
        q, k, v, gate = leaves
        out = ops.ragged_sparse_attn(q, k, v, gate, tiles=tiles, topk=2)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12])
def test_scores_of_any_size_give_a_softmax(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 128, 64, generator=generator) for _ in range(3))
    block_map = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    sizes = torch.tensor([64, 50])
    out, _ = ops.block_sparse_attn(q, k * size, v, block_map, sizes)
    expected, _ = ops.block_sparse_attn_reference(
        q.double(), (k * size).double(), v.double(), block_map, sizes
    )
    assert (out - expected).norm() / expected.norm() < 1e-4
