// SPDX-License-Identifier: Apache-2.0
#include "vsa/index_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

namespace fastvideo::vsa {

namespace {

// Numbers in the order of scores: NaN below all, both zeros equal.
uint32_t rank_of(float score) {
    if (score != score) return 0;
    score += 0.0f;  // -0 becomes 0
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace

void topk(const float* scores, int64_t num_rows, int num_tiles, int k, int32_t* index) {
    torch::stable::parallel_for(0, num_rows, 16, [&](int64_t begin, int64_t end) {
        std::vector<uint32_t> ranks(num_tiles), order(num_tiles);
        for (int64_t row = begin; row < end; ++row) {
            std::transform(scores + row * num_tiles, scores + (row + 1) * num_tiles, ranks.begin(),
                           rank_of);
            order = ranks;
            std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<>());
            const uint32_t lowest = order[k - 1];
            int equal =
                static_cast<int>(k - std::count_if(order.begin(), order.begin() + k,
                                                   [&](uint32_t rank) { return rank > lowest; }));
            int32_t* out = index + row * k;
            for (int tile = 0; tile < num_tiles; ++tile)
                if (ranks[tile] > lowest || (ranks[tile] == lowest && equal-- > 0)) *out++ = tile;
        }
    });
}

void map_to_index(const bool* block_map, int64_t num_rows, int num_tiles, int32_t* index,
                  int32_t* counts) {
    torch::stable::parallel_for(0, num_rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            int32_t* out = index + row * num_tiles;
            int count = 0;
            for (int tile = 0; tile < num_tiles; ++tile)
                if (block_map[row * num_tiles + tile]) out[count++] = tile;
            std::fill(out + count, out + num_tiles, 0);
            counts[row] = count;
        }
    });
}

void invert(const int32_t* index, const int32_t* counts, int64_t num_heads, int num_q_tiles, int k,
            int num_kv_tiles, int32_t* offsets, int32_t* rows) {
    const int64_t num_entries = static_cast<int64_t>(num_q_tiles) * k;
    torch::stable::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> next(num_kv_tiles);
        for (int64_t head = begin; head < end; ++head) {
            const int32_t* from = index + head * num_entries;
            int32_t* starts = offsets + head * (num_kv_tiles + 1);
            int32_t* to = rows + head * num_entries;
            const auto for_entries = [&](auto use) {
                for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
                    const int count = counts ? counts[head * num_q_tiles + q_tile] : k;
                    for (int i = 0; i < count; ++i)
                        use(from[static_cast<int64_t>(q_tile) * k + i], q_tile);
                }
            };
            std::fill(starts, starts + num_kv_tiles + 1, 0);
            for_entries([&](int32_t kv_tile, int) { ++starts[kv_tile + 1]; });
            for (int i = 0; i < num_kv_tiles; ++i) starts[i + 1] += starts[i];
            std::copy(starts, starts + num_kv_tiles, next.begin());
            for_entries([&](int32_t kv_tile, int q_tile) { to[next[kv_tile]++] = q_tile; });
            std::fill(to + starts[num_kv_tiles], to + num_entries, 0);
        }
    });
}

}  // namespace fastvideo::vsa
