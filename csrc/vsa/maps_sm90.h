// SPDX-License-Identifier: Apache-2.0
// Tensor maps of the operands that the fine attention reads by bulk copies.
#pragma once

#include "cuda/tensor_map.h"
#include "vsa/ring_sm90.cuh"

namespace fastvideo::vsa::sm90 {

inline TileMaps map_tiles(const char* name, const Rows& rows, const Problem& p, int num_tokens) {
    const cuda::MappedTensor tensor{name,    rows.data, p.is_bf16,  p.head_dim, num_tokens,
                                    p.heads, p.batch,   rows.token, rows.head,  rows.batch};
    return {cuda::map_boxes(tensor, kTileRows), cuda::map_boxes(tensor, kStep)};
}

}  // namespace fastvideo::vsa::sm90
