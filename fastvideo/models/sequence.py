# SPDX-License-Identifier: Apache-2.0
"""Ulysses: the tokens of a sample lie on several processes, heads take their place in attention.

Each process works on consecutive tokens; for attention it exchanges them for all tokens of some of
the heads, and back (Jacobs et al., 2023). Parts may differ by a token, nothing is padded.

Axes: B batch, S tokens of this process, N tokens of all, H heads, h = H / number of processes,
K head dimension, D any channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class SequenceParallel:
    """The processes that share samples, and which tokens lie where."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """``group`` holds the processes in the order of their tokens."""
        self._group = group
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def parts(self, num_tokens: int) -> list[slice]:
        """The tokens of each process; the first ones take one more where they do not divide."""
        least, more = divmod(num_tokens, self._size)
        ends = [(rank + 1) * least + min(rank + 1, more) for rank in range(self._size)]
        return [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]

    def part(self, num_tokens: int) -> slice:
        """The tokens of this process."""
        return self.parts(num_tokens)[self._rank]

    def to_heads(self, x_BSHK: Tensor, *, sizes: list[int]) -> Tensor:
        """Exchange all heads of our tokens for all tokens, in order of the processes, of our heads.

        Args:
            x_BSHK: H divisible by the number of processes.
            sizes: Number of tokens of each process.

        Returns:
            (B, N, h, K).
        """
        batch, ours, heads, _ = x_BSHK.shape
        assert heads % self._size == 0 and ours == sizes[self._rank]
        sent_nSBhK = x_BSHK.unflatten(2, (self._size, -1)).permute(2, 1, 0, 3, 4)
        received = self._exchange(
            sent_nSBhK.flatten(0, 1).flatten(1), sent=[ours] * self._size, received=sizes
        )
        x_NBhK: Tensor = received.unflatten(1, (batch, heads // self._size, -1))
        return x_NBhK.transpose(0, 1)

    def to_tokens(self, x_BNhK: Tensor, *, sizes: list[int]) -> Tensor:
        """Undo `to_heads`: (B, S, H, K)."""
        batch, _, heads, _ = x_BNhK.shape
        ours = sizes[self._rank]
        received = self._exchange(
            x_BNhK.transpose(0, 1).flatten(1), sent=sizes, received=[ours] * self._size
        )
        rows: Tensor = received.unflatten(1, (batch, heads, -1))
        x_nSBhK = rows.unflatten(0, (self._size, ours))
        x_BSHK: Tensor = x_nSBhK.permute(2, 1, 0, 3, 4).flatten(2, 3)
        return x_BSHK

    def gather(self, x_BSD: Tensor, *, sizes: list[int]) -> Tensor:
        """All tokens (B, N, D), on every process.

        Going back, a process takes the gradient of its own tokens: each of them computes the same
        loss from the result, which counts once.
        """
        gathered: Tensor = _Gather.apply(x_BSD, self._group, sizes)  # type: ignore[no-untyped-call]
        return gathered

    def _exchange(self, rows: Tensor, *, sent: list[int], received: list[int]) -> Tensor:
        return all_to_all_single_autograd(rows.contiguous(), received, sent, self._group)


def frames_of(tokens: slice, *, per_frame: int) -> tuple[slice, slice]:
    """The latent frames that hold ``tokens``, and where these lie among the tokens of those."""
    frames = slice(tokens.start // per_frame, -(-tokens.stop // per_frame))
    skipped = frames.start * per_frame
    return frames, slice(tokens.start - skipped, tokens.stop - skipped)


class _Gather(torch.autograd.Function):
    """All-gather of parts that may differ in size."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
        first = sum(sizes[: dist.get_rank(group)])
        ctx.part = slice(first, first + x_BSD.shape[1])
        rows = x_BSD.transpose(0, 1).contiguous()
        gathered = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_to_all_single(
            gathered,
            rows.repeat(len(sizes), 1, 1),
            output_split_sizes=sizes,
            input_split_sizes=[len(rows)] * len(sizes),
            group=group,
        )
        return gathered.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return gradients[0][:, ctx.part].contiguous(), None, None
