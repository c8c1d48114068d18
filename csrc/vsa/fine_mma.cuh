// SPDX-License-Identifier: Apache-2.0
// What forward and backward by mma.sync share: tiles in shared memory, and how warps read them.
//
// A block works on one tile of 64 rows, its own, and walks the list of tiles on the other side.
// Each of four warps owns 16 rows; those past the tile's tokens compute nothing. The other side is
// taken in steps of 16 tokens, so that ragged tiles cost what they hold.
#pragma once

#include "cuda/device.h"
#include "vsa/fine.h"

namespace fastvideo::vsa {

inline constexpr int kTileRows = 64;
inline constexpr int kStep = 16;  // rows of a warp, and tokens of the other side taken at a time
inline constexpr int kThreads = kTileRows / kStep * 32;
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// Numbers that one thread copies at a time: 16 bytes.
inline constexpr int kChunk = 8;

template <int D>
inline constexpr int kTileBytes = kTileRows * D * 2;

// Of unsigned numbers, so that the compiler makes them masks and shifts and no more.
__device__ __forceinline__ int thread_mod(unsigned n) { return static_cast<int>(threadIdx.x % n); }
__device__ __forceinline__ int thread_div(unsigned n) { return static_cast<int>(threadIdx.x / n); }
__device__ __forceinline__ int lane_div(unsigned n) {
    return static_cast<int>(threadIdx.x % 32 / n);
}

__device__ __forceinline__ int clamp(int value, int low, int high) {
    return min(max(value, low), high);
}

// ---- tables, where what is out of range is brought into it -------------------------------------

__device__ __forceinline__ Tile tile_at(const Tile* tiles, int i, int num_tiles, int num_tokens) {
    const Tile tile = tiles[clamp(i, 0, num_tiles - 1)];
    const int first = clamp(tile.first, 0, num_tokens - 1);
    return {first, clamp(tile.tokens, 1, min(kTileRows, num_tokens - first))};
}

// The rows of an output that a tile's block writes: its own, and 0 for padding up to the next tile.
struct Span {
    Tile tile;
    int begin, end;
};

__device__ __forceinline__ Span span_of(const Tile* tiles, int i, int num_tiles, int num_tokens) {
    const Tile tile = tile_at(tiles, i, num_tiles, num_tokens);
    const int after = tile.first + tile.tokens;
    const int end = i + 1 < num_tiles ? clamp(tiles[i + 1].first, after, num_tokens) : num_tokens;
    return {tile, i == 0 ? 0 : tile.first, end};
}

// The tiles that a list names. A warp looks up 32 at a time, so that their two dependent loads
// are not waited for at each.
class TileList {
  public:
    __device__ TileList(const int32_t* list, int count, const Tile* tiles, int num_tiles,
                        int num_tokens)
        : list_(list),
          tiles_(tiles),
          count_(count),
          num_tiles_(num_tiles),
          num_tokens_(num_tokens) {}

    // The i-th, one without tokens at the end: by whole warps, for i = 0, 1, 2, ...
    __device__ Tile next(int i) {
        if (i % 32 == 0) {
            const int own = i + thread_mod(32);
            held_ =
                own < count_ ? tile_at(tiles_, list_[own], num_tiles_, num_tokens_) : Tile{0, 0};
        }
        return {__shfl_sync(cuda::kAllLanes, held_.first, i % 32),
                __shfl_sync(cuda::kAllLanes, held_.tokens, i % 32)};
    }

  private:
    const int32_t* list_;
    const Tile* tiles_;
    int count_, num_tiles_, num_tokens_;
    Tile held_;
};

// ---- tiles in shared memory --------------------------------------------------------------------

// Rows lie one after another; the 16-byte chunks of a row change places by its number, so that
// chunks of the same channels of eight rows lie in different banks. As tiles are aligned to a row,
// the chunk 2 * i further on is at the address with bits flipped: `address ^ 32 * i`.
template <int D>
__device__ __forceinline__ uint32_t chunk_address(uint32_t tile, int row, int chunk) {
    return tile + static_cast<uint32_t>(row * D * 2 + (chunk ^ (row & 7)) * 16);
}

template <class T>
__device__ __forceinline__ T* row_pointer(const Rows& rows, int batch, int head, int token) {
    return static_cast<T*>(rows.data) + batch * rows.batch + head * rows.head + token * rows.token;
}

__device__ __forceinline__ int steps_of(int tokens) {
    return static_cast<int>(static_cast<unsigned>(tokens + kStep - 1) / kStep);
}

// Has the block copy a tile of a head, of which `head` is token 0; zeros up to a multiple of 16
// rows.
template <class T, int D>
__device__ __forceinline__ void copy_tile(uint32_t slot, const T* head, int stride, Tile tile) {
    constexpr int kChunks = D / kChunk, kRowsAtOnce = kThreads / kChunks;
    const int chunk = thread_mod(kChunks);
    const int first = thread_div(kChunks);
    const int tokens = tile.tokens - first, padded = steps_of(tile.tokens) * kStep - first;
    const uint32_t to = chunk_address<D>(slot, first, chunk);
    const T* from = head + chunk * kChunk + static_cast<int64_t>(tile.first + first) * stride;
#pragma unroll
    for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
        // Rows at once are a multiple of 8, so the chunk's place in its row stays the same.
        if (i < padded) cuda::copy_async_16(to + i * D * 2, from, i < tokens);
        from += kRowsAtOnce * stride;
    }
}

// ---- operands of mma ---------------------------------------------------------------------------

// A: 16 rows from `row` on, channels 16 * step and on.
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int step) {
    const uint32_t first = chunk_address<D>(tile, thread_mod(16), lane_div(16));
    cuda::load_matrices(a, (first ^ step * 32) + row * D * 2);
}

// B where the tile's rows are columns of B: rows `row` to + 7 in b[0] and b[1], the next 8 in b[2]
// and b[3]; channels 16 * step and on are summed over.
template <int D>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int row, int step) {
    const uint32_t first =
        chunk_address<D>(tile, lane_div(16) * 8 + thread_mod(8), lane_div(8) % 2);
    cuda::load_matrices(b, (first ^ step * 32) + row * D * 2);
}

// B where the tile's rows, 16 from `row` on, are summed over; columns of B are channels 16 * step
// to + 7 in b[0] and b[1], the next 8 in b[2] and b[3].
template <int D>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], uint32_t tile, int row,
                                                  int step) {
    const uint32_t first = chunk_address<D>(tile, thread_mod(16), lane_div(16));
    cuda::load_matrices_transposed(b, (first ^ step * 32) + row * D * 2);
}

// 16x16 numbers that a warp has computed as its next A operand.
template <class T>
__device__ __forceinline__ void pack_a(uint32_t (&a)[4], const float (&left)[4],
                                       const float (&right)[4]) {
    a[0] = cuda::pack<T>(left[0], left[1]);
    a[1] = cuda::pack<T>(left[2], left[3]);
    a[2] = cuda::pack<T>(right[0], right[1]);
    a[3] = cuda::pack<T>(right[2], right[3]);
}

// sums (16 x D) += a (16x16) * the tile's 16 rows from `row` on.
template <class T, int D>
__device__ __forceinline__ void multiply_rows(float (&sums)[D / 8][4], const uint32_t (&a)[4],
                                              uint32_t tile, int row = 0) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t b[4];
        load_b_transposed<D>(b, tile, row, step);
        cuda::mma<T>(sums[2 * step], a, b[0], b[1]);
        cuda::mma<T>(sums[2 * step + 1], a, b[2], b[3]);
    }
}

// scores (16x16) = rows in `a` (16 x D) times the 16 rows at `tile`.
template <class T, int D>
__device__ __forceinline__ void multiply_channels(float (&scores)[2][4],
                                                  const uint32_t (&a)[D / 16][4], uint32_t tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][i] = scores[1][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t b[4];
        load_b<D>(b, tile, 0, step);
        cuda::mma<T>(scores[0], a[step], b[0], b[1]);
        cuda::mma<T>(scores[1], a[step], b[2], b[3]);
    }
}

// ---- results -----------------------------------------------------------------------------------

// Writes the warp's 16 rows of sums, lane / 4 times scale[0] and those 8 below times scale[1], by
// way of shared memory (64 * D floats for the block, which no one else may be using) as whole
// chunks, to each of which `finish(float (&values)[8], int row, int chunk)` may add something.
template <class T, int D, class Finish>
__device__ __forceinline__ void write_rows(const float (&sums)[D / 8][4], float scale_above,
                                           float scale_below, unsigned char* shared, T* rows,
                                           int64_t stride, int tokens, Finish finish) {
    const int lane = thread_mod(32), warp = thread_div(32);
    unsigned char* staged = shared + warp * kStep * D * 4;
    // Four numbers at a time; chunks change places by the row, against bank conflicts.
    const auto place = [&](int row, int column) {
        return staged + row * D * 4 + (column / 4 ^ (row & 3) << 1) * 16 + column % 4 * 4;
    };
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        const int row = lane / 4, column = n * 8 + lane % 4 * 2;
        cuda::store(place(row, column),
                    make_float2(sums[n][0] * scale_above, sums[n][1] * scale_above));
        cuda::store(place(row + 8, column),
                    make_float2(sums[n][2] * scale_below, sums[n][3] * scale_below));
    }
    __syncwarp();
    constexpr int kChunks = D / kChunk;
    const int chunk = lane % kChunks;
#pragma unroll 2
    for (int i = lane / kChunks; i < kStep; i += 32 / kChunks) {
        const int row = warp * kStep + i;
        if (row >= tokens) break;
        const auto low = cuda::load<float4>(place(i, chunk * kChunk));
        const auto high = cuda::load<float4>(place(i, chunk * kChunk + 4));
        float values[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        finish(values, row, chunk);
        cuda::store(
            rows + row * stride + chunk * kChunk,
            make_uint4(cuda::pack<T>(values[0], values[1]), cuda::pack<T>(values[2], values[3]),
                       cuda::pack<T>(values[4], values[5]), cuda::pack<T>(values[6], values[7])));
    }
}

// Eight numbers of a row as float32.
template <class T>
__device__ __forceinline__ void load_chunk(float (&values)[kChunk], const T* from) {
    const auto words = cuda::load<uint4>(from);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 both = cuda::unpack<T>(pairs[i]);
        values[2 * i] = both.x;
        values[2 * i + 1] = both.y;
    }
}

struct AsItIs {
    __device__ void operator()(float (&)[kChunk], int, int) const {}
};

// Calls `function(token)` for padding tokens of the span, each by D / 8 neighbouring threads.
template <int D, class Function>
__device__ __forceinline__ void for_padding(const Span& span, Function function) {
    constexpr int kChunks = D / kChunk;
    const int after = span.tile.first + span.tile.tokens;
    for (int i = span.begin + thread_div(kChunks); i < span.end; i += kThreads / kChunks)
        if (i < span.tile.first || i >= after) function(i);
}

// Zeros in the padding rows of an output, of which `rows` is token 0.
template <class T, int D>
__device__ __forceinline__ void zero_padding(const Span& span, T* rows, int64_t stride) {
    const int chunk = thread_mod(D / kChunk);
    for_padding<D>(span, [&](int token) {
        cuda::store(rows + token * stride + chunk * kChunk, make_uint4(0, 0, 0, 0));
    });
}

// Calls `function` with the element type and head dim of a problem as types.
template <class T, int D>
struct Kind {
    using Element = T;
    static constexpr int kHeadDim = D;
};
template <class Function>
void dispatch(const Problem& problem, Function function) {
    if (problem.is_bf16)
        problem.head_dim == 64 ? function(Kind<cuda::BFloat16, 64>{})
                               : function(Kind<cuda::BFloat16, 128>{});
    else
        problem.head_dim == 64 ? function(Kind<cuda::Float16, 64>{})
                               : function(Kind<cuda::Float16, 128>{});
}

}  // namespace fastvideo::vsa
