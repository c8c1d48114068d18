// SPDX-License-Identifier: Apache-2.0
// Fine attention on the CPU: threads and memory around the kernels.
#pragma once

#include "vsa/fine.h"
#include "vsa/kernels_cpu.h"

namespace fastvideo::vsa {

// Values of tiles, index, counts, offsets and rows must be in range.
void fine_forward(const FineForward& problem, Dtype dtype);
void fine_backward(const FineBackward& problem, Dtype dtype);

inline size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline HeadRows rows_of(const Rows& rows, Dtype dtype, int batch, int head) {
    if (rows.data == nullptr) return {};
    const int64_t elements = batch * rows.batch + head * rows.head;
    return {static_cast<std::byte*>(rows.data) + elements * static_cast<int64_t>(size_of(dtype)),
            rows.token};
}

// Rows between two tiles belong to the first, rows before all tiles to the first of them.
inline OwnedTile owned(const Tile* tiles, int num_tiles, int num_tokens, int i) {
    return {tiles[i], i == 0 ? 0 : tiles[i].first,
            i + 1 < num_tiles ? tiles[i + 1].first : num_tokens};
}

}  // namespace fastvideo::vsa
