# SPDX-License-Identifier: Apache-2.0
"""Attention over whole sequences; the one place where sparse and parallel variants plug in.

Axes: B batch, S tokens of the video, H heads, K head dimension.
"""

import torch.nn.functional as F
from torch import Tensor


def dense(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    """Softmax attention with scale ``K ** -0.5``; key length may differ from query length.

    Returns:
        (B, S, H, K) of the dtype of ``q``.
    """
    out_BHSK = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2)
    )
    return out_BHSK.transpose(1, 2)
