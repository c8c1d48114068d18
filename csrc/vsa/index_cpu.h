// SPDX-License-Identifier: Apache-2.0
// Which key tiles a query tile attends to, on the CPU: selection, lists and their inverse.
#pragma once

#include <cstdint>

namespace fastvideo::vsa {

// The k highest of each of `num_rows` rows of scores (num_rows, num_tiles), ascending.
void topk(const float* scores, int64_t num_rows, int num_tiles, int k, int32_t* index);

// The true columns of each row, ascending and then zeros.
void map_to_index(const bool* block_map, int64_t num_rows, int num_tiles, int32_t* index,
                  int32_t* counts);

// For each of `num_heads` index (Q,k) -> offsets (K+1) into rows (Q*k); counts may be null.
void invert(const int32_t* index, const int32_t* counts, int64_t num_heads, int num_q_tiles, int k,
            int num_kv_tiles, int32_t* offsets, int32_t* rows);

}  // namespace fastvideo::vsa
