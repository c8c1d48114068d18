# SPDX-License-Identifier: Apache-2.0
"""Cases of fine attention's operators on the CPU against torch in float64.

python -m tests.unit.ops.vsa_cpu_cases [LIBRARY]     # every case, with that library
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastvideo.ops import library

Optional = Tensor | None


@dataclass(frozen=True)
class Case:
    """One call: tokens of each tile, tiles selected, and what is given."""

    dtype: torch.dtype = torch.float32
    channels: int = 64
    q_sizes: tuple[int, ...] = (64, 33)
    kv_sizes: tuple[int, ...] = (17, 64, 31)
    k: int = 2
    batch: int = 1
    heads: int = 2
    padding: int = 0
    """Rows of NaN after each tile."""
    counts: bool = False
    coarse: bool = True
    gate: bool = True
    transposed: bool = True
    """(B,H,S,D) is a view of (B,S,H,D)."""

    def __str__(self) -> str:
        given = [name for name in ("counts", "coarse", "gate") if getattr(self, name)]
        sizes = f"{len(self.q_sizes)}x{len(self.kv_sizes)} tiles of {self.k}"
        return f"{str(self.dtype)[6:]}, {self.channels}, {sizes}, {' '.join(given)}"


RAGGED = Case(q_sizes=(64, 64, 37, 1), kv_sizes=(64, 13, 64, 64, 5), k=3)
CASES = (
    *(replace(RAGGED, channels=channels) for channels in (3, 16, 64, 80, 128, 256)),
    Case(q_sizes=(64,), kv_sizes=(64,), k=1),
    Case(q_sizes=(1,), kv_sizes=(3,), k=1, channels=1, transposed=False),
    Case(k=1, batch=3, heads=1, transposed=False),
    Case(k=3, padding=3, counts=True),
    Case(k=3, padding=5, counts=True, channels=20, gate=False),
    Case(k=2, gate=False),
    Case(k=2, coarse=False, gate=False, counts=True),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def every_case() -> list[Case]:
    """The cases in each dtype; a head of one channel is float32 only, its dq cancels."""
    return [
        replace(case, dtype=dtype)
        for dtype in DTYPES
        for case in CASES
        if case.channels > 1 or dtype == torch.float32
    ]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the operators."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    counts: Optional
    q_tiles: Tensor
    kv_tiles: Tensor
    coarse: Optional
    gate: Optional
    grad: Tensor

    @property
    def forward(self) -> tuple[Optional, ...]:
        """Arguments of vsa_fine_forward."""
        return (self.q, self.k, self.v, *self.chosen, self.coarse, self.gate)

    @property
    def chosen(self) -> tuple[Optional, ...]:
        """Which tiles attend to which."""
        return (self.index, self.counts, self.q_tiles, self.kv_tiles)


def table_of(sizes: Sequence[int], padding: int) -> Tensor:
    """Tiles one after the other, each with padding behind it."""
    firsts = torch.tensor([0, *sizes]).cumsum(0)[:-1] + padding * torch.arange(len(sizes))
    return torch.stack([firsts, torch.tensor(sizes)], dim=1).int()


def make_inputs(case: Case) -> Inputs:
    """Random and not zero, with NaN in all padding."""
    generator = torch.Generator().manual_seed(0)
    q_tiles, kv_tiles = table_of(case.q_sizes, case.padding), table_of(case.kv_sizes, case.padding)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def tokens(tiles: Tensor) -> Tensor:
        num_tokens = int(tiles[-1].sum()) + case.padding
        made = torch.full((case.batch, num_tokens, case.heads, case.channels), torch.nan)
        for first, size in tiles.tolist():
            made[:, first : first + size] = normal(case.batch, size, case.heads, case.channels)
        rows = made.to(case.dtype).transpose(1, 2)
        return rows if case.transposed else rows.contiguous()

    num_q, num_kv = len(case.q_sizes), len(case.kv_sizes)
    shape = (case.batch, case.heads, num_q)
    index = library.operators().vsa_topk(normal(*shape, num_kv), case.k)
    counts = torch.arange(case.batch * case.heads * num_q).reshape(shape) % (case.k + 1)
    return Inputs(
        q=tokens(q_tiles),
        k=tokens(kv_tiles),
        v=tokens(kv_tiles),
        index=index,
        counts=counts.int() if case.counts else None,
        q_tiles=q_tiles,
        kv_tiles=kv_tiles,
        coarse=normal(*shape, case.channels) if case.coarse else None,
        gate=tokens(q_tiles) if case.gate else None,
        grad=tokens(q_tiles),
    )


def tile_of_tokens(tiles: Tensor, num_tokens: int) -> Tensor:
    """(S,) number of each token's tile, -1 for padding."""
    numbers = torch.full((num_tokens,), -1)
    for number, (first, size) in enumerate(tiles.tolist()):
        numbers[first : first + size] = number
    return numbers


def reference(inputs: Inputs) -> list[Tensor]:
    """Output, log-sum-exp and all gradients in float64."""

    def leaf(x: Optional) -> Optional:
        return None if x is None else x.double().nan_to_num().requires_grad_()

    q, k, v, coarse, gate = map(leaf, (inputs.q, inputs.k, inputs.v, inputs.coarse, inputs.gate))
    assert q is not None and k is not None and v is not None
    q_tile = tile_of_tokens(inputs.q_tiles, q.shape[2])
    kv_tile = tile_of_tokens(inputs.kv_tiles, k.shape[2])
    width = inputs.index.shape[3]
    chosen = torch.zeros((*inputs.index.shape[:3], len(inputs.kv_tiles)), dtype=torch.bool)
    counts = inputs.index.new_tensor(width) if inputs.counts is None else inputs.counts[..., None]
    is_counted = (torch.arange(width) < counts).expand(inputs.index.shape)
    chosen.scatter_(3, inputs.index.long(), is_counted)
    mask = chosen[:, :, q_tile][..., kv_tile] & (q_tile >= 0)[:, None] & (kv_tile >= 0)
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=3)
    out = (scores - lse.nan_to_num(neginf=0)[..., None]).exp() @ v
    if coarse is not None:
        spread = coarse[:, :, q_tile] * (q_tile >= 0)[:, None]
        out = out + (spread if gate is None else spread * gate)
    out.backward(inputs.grad.double().nan_to_num())
    grads = [x.grad for x in (q, k, v, coarse, gate) if x is not None]
    return [out.detach(), lse.detach(), *(grad for grad in grads if grad is not None)]


def poison(like: Tensor) -> None:
    """Leave NaN in memory that the next allocations are likely to get."""
    left = [torch.full_like(like, torch.nan) for _ in range(6)]
    del left


def run(inputs: Inputs) -> list[Tensor]:
    """What the operators return, in the order of `reference`."""
    operators = library.operators()
    poison(inputs.q)
    out, lse = operators.vsa_fine_forward(*inputs.forward)
    inverse = operators.vsa_invert(inputs.index, inputs.counts, len(inputs.kv_tiles))
    poison(inputs.q)
    grads = operators.vsa_fine_backward(
        inputs.grad,
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        inputs.index,
        inputs.counts,
        *inverse,
        inputs.q_tiles,
        inputs.kv_tiles,
        inputs.coarse,
        inputs.gate,
    )
    given = (True, True, True, inputs.coarse is not None, inputs.gate is not None)
    for grad, is_given in zip(grads, given, strict=True):
        assert is_given or grad.shape == (0,)
    return [out, lse, *(grad for grad, is_given in zip(grads, given, strict=True) if is_given)]


def check(case: Case) -> None:
    """Compare one case; an AssertionError says which result is off."""
    inputs = make_inputs(case)
    names = ["out", "lse", "dq", "dk", "dv", "dcoarse", "dgate"]
    found, wanted = run(inputs), reference(inputs)
    for name, ours, theirs in zip(names, found, wanted, strict=False):
        assert torch.equal(ours.isinf(), theirs.isinf()), f"{case}: {name}"
        error = torch.where(theirs.isinf(), 0, ours.double() - theirs)
        size = torch.where(theirs.isinf(), 0, theirs).norm().clamp(min=1e-30)
        relative = (error.norm() / size).item()
        assert relative <= TOLERANCES[case.dtype], f"{case}: {name} is off by {relative:.1e}"


def main() -> None:
    """Run every case and say for which instruction set."""
    print(library.cpu_isa(), flush=True)
    for case in every_case():
        check(case)


if __name__ == "__main__":
    main()
