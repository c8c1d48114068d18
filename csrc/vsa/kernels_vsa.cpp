// SPDX-License-Identifier: Apache-2.0
// Means of tiles, and the table of all kernels of Video Sparse Attention for one instruction set.
#include "vsa/kernels_backward.h"
#include "vsa/kernels_forward.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

namespace {

template <class T>
void pool(HeadRows x, Tile tile, int head_dim, float* mean) {
    const Floats share = splat(1.0f / static_cast<float>(tile.tokens));
    for_vectors(head_dim, [&](int channel, int count) {
        Floats sum{};
        for (int i = 0; i < tile.tokens; ++i)
            sum += load_some(row<T>(x, tile.first + i) + channel, count);
        store_some(mean + channel, sum * share, count);
    });
}

template <class T>
void pool_backward(const float* grad, OwnedTile tile, int head_dim, HeadRows out) {
    const Floats share = splat(1.0f / static_cast<float>(tile.tokens));
    for_vectors(head_dim, [&](int channel, int count) {
        const Floats value = load_some(grad + channel, count) * share;
        for (int i = 0; i < tile.tokens; ++i)
            store_some(mutable_row<T>(out, tile.first + i) + channel, value, count);
    });
    zero_padding<T>(out, tile, head_dim);
}

template <class T>
constexpr vsa::FineKernels fine_kernels() {
    return {kv_bytes<T>, forward_bytes<T>, query_bytes<T>, backward_bytes<T>,
            pack_kv<T>,  forward<T>,       begin_query<T>, begin_key<T>,
            pair<T>,     add_dq<T>,        end_key<T>,     end_query<T>};
}

template <class T>
constexpr vsa::PoolKernels pool_kernels() {
    return {pool<T>, pool_backward<T>};
}

}  // namespace

const vsa::Kernels& vsa_kernels() {
    static constexpr vsa::Kernels kernels{
        {fine_kernels<float>(), fine_kernels<BFloat16>(), fine_kernels<Float16>()},
        {pool_kernels<float>(), pool_kernels<BFloat16>(), pool_kernels<Float16>()}};
    return kernels;
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
