# SPDX-License-Identifier: Apache-2.0
"""Attention over whole sequences; the one place where sparse and parallel variants plug in.

Axes: B batch, S query tokens, N key tokens, H heads, h of them on one process, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvideo.models.sequence import SequenceParallel

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of each position's angles, float32 (1, S, 1, K), every angle twice in a row."""


def dense(
    q_BSHK: Tensor, k_BNHK: Tensor, v_BNHK: Tensor, *, mask_B11N: Tensor | None = None
) -> Tensor:
    """Softmax attention with scale ``K ** -0.5``; key length may differ from query length.

    Args:
        q_BSHK: Queries.
        k_BNHK: Keys.
        v_BNHK: Values.
        mask_B11N: bool, False where a key takes no part.

    Returns:
        (B, S, H, K) of the dtype of ``q``.
    """
    out_BHSK = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2), k_BNHK.transpose(1, 2), v_BNHK.transpose(1, 2), attn_mask=mask_B11N
    )
    return out_BHSK.transpose(1, 2)


def shared(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHK: Tensor,
    *,
    sequence: SequenceParallel | None,
    sizes: list[int],
    mask_B11N: Tensor | None = None,
) -> Tensor:
    """`dense` of tokens to each other where several processes hold them.

    Args:
        q_BSHK: Queries of our tokens.
        k_BSHK: Keys of our tokens.
        v_BSHK: Values of our tokens.
        sequence: The processes; None where all tokens are ours.
        sizes: Number of tokens of each process.
        mask_B11N: bool, False where a key takes no part; keys in the order of the processes.

    Returns:
        (B, S, H, K) of our tokens.
    """
    if sequence is None:
        return dense(q_BSHK, k_BSHK, v_BSHK, mask_B11N=mask_B11N)
    # Norms under autocast give float32, which attention casts: cast before it travels.
    dtype = v_BSHK.dtype
    together = torch.cat((q_BSHK.to(dtype), k_BSHK.to(dtype), v_BSHK), dim=3)
    q, k, v = sequence.to_heads(together, sizes=sizes).chunk(3, dim=3)
    return sequence.to_tokens(dense(q, k, v, mask_B11N=mask_B11N), sizes=sizes)


def rotate(x_BSHK: Tensor, rotary: Rotary) -> Tensor:
    """Rotate neighbouring pairs of channels by the position's angle (Su et al., 2021).

    Whole rows are multiplied, not every second channel: strided passes take twice the time.
    """
    cos, sin = rotary
    even, odd = x_BSHK.unflatten(-1, (-1, 2)).unbind(-1)
    turned_BSHK = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x_BSHK * cos + turned_BSHK * sin).to(x_BSHK.dtype)
