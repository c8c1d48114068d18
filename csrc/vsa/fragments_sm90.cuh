// SPDX-License-Identifier: Apache-2.0
// Tiles of 64 rows between global memory and the registers of a warpgroup, in wgmma's layouts.
#pragma once

#include "cuda/device.h"
#include "vsa/ring_sm90.cuh"

namespace fastvideo::vsa::sm90 {

// Of scores: 1 / sqrt(D).
template <int D>
inline constexpr float kScale = D == 64 ? 0.125f : 0.08838834764831845f;
inline constexpr float kLog2OfE = 1.44269504088896341f;

// Thread t of a warpgroup has rows first_row() and first_row() + 8 of a tile and, of every 8
// columns, first_column() and the next.
__device__ __forceinline__ int first_row() {
    return threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
}
__device__ __forceinline__ int first_column() { return 2 * (threadIdx.x % 4); }

// A tile of one batch and head in global memory.
template <class Element>
__device__ __forceinline__ Element* row_of(const Rows& rows, int batch, int head, int token) {
    return static_cast<Element*>(rows.data) + batch * rows.batch + head * rows.head +
           token * rows.token;
}

// Operand A of products over D; zero past the tile's tokens.
template <class T, int D>
__device__ __forceinline__ void load_operand(uint32_t (&a)[D / 16][4], const Rows& from, int batch,
                                             int head, Tile tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row() + 8 * half;
        const bool valid = row < tile.tokens;
        const T* channels =
            row_of<T>(from, batch, head, tile.first + (valid ? row : 0)) + first_column();
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            a[i / 2][i % 2 * 2 + half] = valid ? cuda::load<uint32_t>(channels + 8 * i) : 0;
    }
}

// Starts d = A B^T over D channels, where B is the first 16 `steps` rows of a tile and A is the 64
// rows of a tile in registers, or of another in shared memory.
template <class T, int D, int steps>
__device__ __forceinline__ void start_over_channels(float (&d)[8 * steps],
                                                    const uint32_t (&a)[D / 16][4], uint32_t b) {
    using cuda::B;
    cuda::wgmma<T, 16 * steps, B::kRowsByChannels, false>(d, a[0],
                                                          cuda::rows_by_channels(b, 0, kBoxBytes));
#pragma unroll
    for (int i = 1; i < D / 16; ++i)
        cuda::wgmma<T, 16 * steps, B::kRowsByChannels>(d, a[i],
                                                       cuda::rows_by_channels(b, i, kBoxBytes));
    cuda::wgmma_commit();
}
template <class T, int D, int steps>
__device__ __forceinline__ void start_over_channels(float (&d)[8 * steps], uint32_t a, uint32_t b) {
    using cuda::B;
    cuda::wgmma<T, 16 * steps, B::kRowsByChannels, false>(
        d, cuda::rows_by_channels(a, 0, kBoxBytes), cuda::rows_by_channels(b, 0, kBoxBytes));
#pragma unroll
    for (int i = 1; i < D / 16; ++i)
        cuda::wgmma<T, 16 * steps, B::kRowsByChannels>(d, cuda::rows_by_channels(a, i, kBoxBytes),
                                                       cuda::rows_by_channels(b, i, kBoxBytes));
    cuda::wgmma_commit();
}

// Starts d += A B over the first 16 `steps` rows of tile B, which has D channels.
template <class T, int D, int steps>
__device__ __forceinline__ void start_over_rows(float (&d)[D / 2], uint32_t (&a)[steps][4],
                                                uint32_t b) {
#pragma unroll
    for (int i = 0; i < steps; ++i) cuda::pin(a[i]);
    cuda::pin(d);
    cuda::wgmma_fence();
#pragma unroll
    for (int i = 0; i < steps; ++i)
        cuda::wgmma<T, D, cuda::B::kChannelsByRows>(d, a[i],
                                                    cuda::channels_by_rows(b, i, kBoxBytes));
    cuda::wgmma_commit();
}

// Accumulators of 16 `steps` columns as operand A of products over them.
template <class T, int steps>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[steps][4], const float (&d)[8 * steps]) {
#pragma unroll
    for (int i = 0; i < 4 * steps; ++i) a[i / 4][i % 4] = cuda::pack<T>(d[2 * i], d[2 * i + 1]);
}

// The rows of a 64xD result that are tokens of the tile, times `scale`.
template <class T, int D>
__device__ __forceinline__ void store_rows(const Rows& to, int batch, int head, Tile tile,
                                           const float (&d)[D / 2], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row() + 8 * half;
        if (row >= tile.tokens) continue;
        T* channels = row_of<T>(to, batch, head, tile.first + row) + first_column();
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            cuda::store(channels + 8 * i, cuda::pack<T>(d[4 * i + 2 * half] * scale,
                                                        d[4 * i + 2 * half + 1] * scale));
    }
}

// Calls `clear(token)` for the padding that tile `index` owns: from its first token, or 0, to the
// first of the next, or the end. By a warpgroup, a warp for each token.
template <class Clear>
__device__ __forceinline__ void clear_padding(const Tile* tiles, int index, int num_tiles,
                                              int num_tokens, Clear clear) {
    const Tile tile = tile_at(tiles, index, num_tokens);
    const int end =
        index + 1 < num_tiles ? tile_at(tiles, index + 1, num_tokens).first : num_tokens;
    const int warp = threadIdx.x % kWarpgroup / kWarp;
    if (index == 0)
        for (int token = warp; token < tile.first; token += kWarpgroup / kWarp) clear(token);
    for (int token = tile.first + tile.tokens + warp; token < end; token += kWarpgroup / kWarp)
        clear(token);
}

// A row of zeros, by a warp.
template <class T, int D>
__device__ __forceinline__ void clear_row(const Rows& to, int batch, int head, int token) {
    T* channels = row_of<T>(to, batch, head, token);
    for (int i = 2 * (threadIdx.x % kWarp); i < D; i += 2 * kWarp)
        cuda::store(channels + i, uint32_t{0});
}

}  // namespace fastvideo::vsa::sm90
