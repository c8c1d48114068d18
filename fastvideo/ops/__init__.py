# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention and fused norms: the Python faces of csrc."""

from contextlib import suppress

from fastvideo.ops.dispatch import backends
from fastvideo.ops.library import KernelsMissing, load_if_built
from fastvideo.ops.norm import (
    FusedLayerNorm,
    FusedRMSNorm,
    layer_norm,
    residual_gate,
    residual_gate_layer_norm,
    rms_norm,
    rms_norm_rotary,
)
from fastvideo.ops.norm_reference import (
    layer_norm_reference,
    residual_gate_layer_norm_reference,
    residual_gate_reference,
    rms_norm_reference,
    rms_norm_rotary_reference,
)
from fastvideo.ops.tiles import (
    VSA_TILE_SIZE,
    Tiles,
    build_vsa_metadata,
    construct_variable_block_sizes,
    get_non_pad_index,
    get_reverse_tile_partition_indices,
    get_tile_partition_indices,
)
from fastvideo.ops.vsa import (
    block_sparse_attn,
    block_sparse_attn_from_indices,
    num_selected,
    ragged_sparse_attn,
    selected_tiles,
    video_sparse_attn,
)
from fastvideo.ops.vsa_reference import (
    block_sparse_attn_from_indices_reference,
    block_sparse_attn_reference,
    ragged_sparse_attn_reference,
    selected_tiles_reference,
    video_sparse_attn_reference,
)

__all__ = [
    "VSA_TILE_SIZE",
    "FusedLayerNorm",
    "FusedRMSNorm",
    "KernelsMissing",
    "Tiles",
    "backends",
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "block_sparse_attn_from_indices_reference",
    "block_sparse_attn_reference",
    "build_vsa_metadata",
    "construct_variable_block_sizes",
    "get_non_pad_index",
    "get_reverse_tile_partition_indices",
    "get_tile_partition_indices",
    "layer_norm",
    "layer_norm_reference",
    "num_selected",
    "ragged_sparse_attn",
    "ragged_sparse_attn_reference",
    "residual_gate",
    "residual_gate_layer_norm",
    "residual_gate_layer_norm_reference",
    "residual_gate_reference",
    "rms_norm",
    "rms_norm_reference",
    "rms_norm_rotary",
    "rms_norm_rotary_reference",
    "selected_tiles",
    "selected_tiles_reference",
    "video_sparse_attn",
    "video_sparse_attn_reference",
]

# Without a library that loads, importing works and calls raise KernelsMissing.
with suppress(KernelsMissing):
    load_if_built()
