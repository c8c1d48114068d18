# SPDX-License-Identifier: Apache-2.0
"""Problems for the fine attention, and what it should answer by float64 and autograd.

Axes: B batch, H heads, S query tokens, N key tokens, D channels, Q query tiles, K key tiles, k
selected tiles.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE = 64
GRADIENTS = ("dq", "dk", "dv", "dcoarse", "dgate")


@dataclass(frozen=True)
class Case:
    """A problem: the number of tokens of each tile, and how tensors are laid out."""

    q_tokens: tuple[int, ...]
    kv_tokens: tuple[int, ...] | None = None
    """None: as ``q_tokens``."""
    k: int = 2
    batch: int = 1
    heads: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    counts: tuple[int, ...] | None = None
    """How many of each row's tiles count, in turns; None: all, and no tensor."""
    coarse: bool = True
    gate: bool = True
    tokens_first: bool = False
    """Memory is (B,S,H,D), as a projection leaves it, and not (B,H,S,D)."""
    padded: bool = False
    """Each tile begins at a multiple of 64, so that there is padding between."""
    gap: int = 0
    """Tokens of padding before the first tile and after the last."""

    def __str__(self) -> str:
        """As a name for a test."""
        parts = ["q" + "_".join(map(str, self.q_tokens))]
        default = Case(self.q_tokens)
        for name, value in vars(self).items():
            if name != "q_tokens" and value != getattr(default, name):
                parts.append(f"{name}={str(value).removeprefix('torch.')}".replace(" ", ""))
        return "-".join(parts)


@dataclass(frozen=True)
class Inputs:
    """Arguments of vsa_fine_forward and, with ``grad`` and the inverse lists, of its backward."""

    q_BHSD: Tensor
    k_BHND: Tensor
    v_BHND: Tensor
    index_BHQk: Tensor
    counts_BHQ: Tensor | None
    q_tiles: Tensor
    kv_tiles: Tensor
    coarse_BHQD: Tensor | None
    gate_BHSD: Tensor | None
    grad_BHSD: Tensor
    offsets: Tensor
    rows: Tensor

    def forward(self) -> tuple[Tensor | None, ...]:
        """Arguments of vsa_fine_forward."""
        return (
            *(self.q_BHSD, self.k_BHND, self.v_BHND, self.index_BHQk, self.counts_BHQ),
            *(self.q_tiles, self.kv_tiles, self.coarse_BHQD, self.gate_BHSD),
        )

    def backward(self, out: Tensor, lse: Tensor) -> tuple[Tensor | None, ...]:
        """Arguments of vsa_fine_backward."""
        return (
            *(self.grad_BHSD, self.q_BHSD, self.k_BHND, self.v_BHND, out, lse, self.index_BHQk),
            *(self.counts_BHQ, self.offsets, self.rows, self.q_tiles, self.kv_tiles),
            *(self.coarse_BHQD, self.gate_BHSD),
        )


def table(tokens: tuple[int, ...], case: Case) -> tuple[Tensor, int]:
    """Return a tile table and how many tokens there are in all."""
    rows, first = [], case.gap
    for count in tokens:
        rows.append((first, count))
        first += TILE if case.padded else count
    return torch.tensor(rows, dtype=torch.int32), first + case.gap


def invert(index: Tensor, counts: Tensor | None, num_kv_tiles: int) -> tuple[Tensor, Tensor]:
    """For each key tile the query tiles that chose it: offsets (B,H,K+1) into rows (B,H,Q*k)."""
    batch, heads, num_q_tiles, k = index.shape
    offsets = torch.zeros(batch, heads, num_kv_tiles + 1, dtype=torch.int32)
    rows = torch.full((batch, heads, num_q_tiles * k), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            lists: list[list[int]] = [[] for _ in range(num_kv_tiles)]
            for tile in range(num_q_tiles):
                count = k if counts is None else int(counts[b, h, tile])
                for chosen in index[b, h, tile, :count].tolist():
                    lists[chosen].append(tile)
            flat = torch.tensor([i for one in lists for i in one], dtype=torch.int32)
            rows[b, h, : len(flat)] = flat
            offsets[b, h, 1:] = torch.tensor([len(one) for one in lists]).cumsum(0)
    return offsets, rows


def make(case: Case, *, seed: int = 0) -> Inputs:
    """Draw random tensors for a case; padding holds NaN, which no kernel may let through."""
    generator = torch.Generator().manual_seed(seed)
    kv_tokens = case.q_tokens if case.kv_tokens is None else case.kv_tokens
    q_tiles, num_q = table(case.q_tokens, case)
    kv_tiles, num_kv = table(kv_tokens, case)

    def rows(tiles: Tensor, total: int) -> Tensor:
        shape = (case.batch, case.heads, total, case.head_dim)
        if case.tokens_first:
            shape = (case.batch, total, case.heads, case.head_dim)
        full = torch.randn(shape, generator=generator).to(case.dtype)
        full = full.transpose(1, 2) if case.tokens_first else full
        inside = torch.zeros(total, dtype=torch.bool)
        for first, count in tiles.tolist():
            inside[first : first + count] = True
        full[:, :, ~inside] = float("nan")
        return full

    lists = (case.batch, case.heads, len(q_tiles))
    chosen = torch.rand(*lists, len(kv_tiles), generator=generator).argsort(-1)[..., : case.k]
    index = chosen.sort(-1).values.to(torch.int32)
    counts = None
    if case.counts is not None:
        turns = [case.counts[i % len(case.counts)] for i in range(torch.Size(lists).numel())]
        counts = torch.tensor(turns, dtype=torch.int32).view(lists)
    offsets, inverse = invert(index, counts, len(kv_tiles))
    coarse = torch.randn(*lists, case.head_dim, generator=generator) if case.coarse else None
    return Inputs(
        q_BHSD=rows(q_tiles, num_q),
        k_BHND=rows(kv_tiles, num_kv),
        v_BHND=rows(kv_tiles, num_kv),
        index_BHQk=index,
        counts_BHQ=counts,
        q_tiles=q_tiles,
        kv_tiles=kv_tiles,
        coarse_BHQD=coarse,
        gate_BHSD=rows(q_tiles, num_q) if case.gate else None,
        grad_BHSD=rows(q_tiles, num_q),
        offsets=offsets,
        rows=inverse,
    )


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Answer in float64: out, lse and the gradients; 0 in padding, minus infinity in its lse."""
    given = {
        "dq": inputs.q_BHSD,
        "dk": inputs.k_BHND,
        "dv": inputs.v_BHND,
        "dcoarse": inputs.coarse_BHQD,
        "dgate": inputs.gate_BHSD,
    }
    leaves = {
        name: tensor.double().nan_to_num(0).requires_grad_()
        for name, tensor in given.items()
        if tensor is not None
    }
    q, k, v = leaves["dq"], leaves["dk"], leaves["dv"]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, tile in torch.cartesian_prod(
        *map(torch.arange, inputs.index_BHQk.shape[:3])
    ).tolist():
        first, tokens = inputs.q_tiles[tile].tolist()
        rows = slice(first, first + tokens)
        chosen = inputs.index_BHQk[b, h, tile]
        if inputs.counts_BHQ is not None:
            chosen = chosen[: inputs.counts_BHQ[b, h, tile]]
        result = torch.zeros_like(q[b, h, rows])
        if len(chosen):
            spans = inputs.kv_tiles[chosen.long()].tolist()
            keys = torch.cat([torch.arange(i, i + n) for i, n in spans])
            scores = q[b, h, rows] @ k[b, h, keys].T / q.shape[-1] ** 0.5
            result = scores.softmax(-1) @ v[b, h, keys]
            lse[b, h, rows] = scores.logsumexp(-1)
        if "dcoarse" in leaves:
            mean = leaves["dcoarse"][b, h, tile]
            result = result + (mean * leaves["dgate"][b, h, rows] if "dgate" in leaves else mean)
        out = out.index_put(
            (torch.tensor(b), torch.tensor(h), torch.arange(first, first + tokens)), result
        )
    gradients = torch.autograd.grad(
        out, list(leaves.values()), inputs.grad_BHSD.double().nan_to_num(0), allow_unused=True
    )
    answer = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        answer[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return answer


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


__all__ = ["GRADIENTS", "Case", "Inputs", "error", "expected", "invert", "make", "replace"]
