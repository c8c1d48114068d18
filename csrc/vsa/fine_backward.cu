// SPDX-License-Identifier: Apache-2.0
// Backward of the fine attention by mma.sync: gradients of queries by query tiles, those of keys
// and values by key tiles, each summed in the order of its list, in registers, without atomics.
//
// With P the weights and dP = grad * v^T, the gradient of the scores is dS = P (dP - delta); then
// dq = dS * k, dk = dS^T * q and dv = P^T * grad. Scores are computed anew, 16x16 at a time.

#include "vsa/fine_cuda.h"
#include "vsa/fine_mma.cuh"

namespace fastvideo::vsa {

namespace {

using cuda::exp2_approx;

// A head of two tensors, tiles of which are copied together.
template <class T>
struct Pair {
    const T *first, *second;
    int first_stride, second_stride;
};

// What else of its rows a tile of queries brings along; a number for each thread to copy.
struct RowNumbers {
    float lse[kTileRows], delta[kTileRows];
};
static_assert(sizeof(RowNumbers) == kThreads * sizeof(float));
template <int D>
inline constexpr int kStageBytes = 2 * kTileBytes<D>;
template <int D>
inline constexpr int kSharedBytes = 2 * kStageBytes<D> + 2 * static_cast<int>(sizeof(RowNumbers));

template <class T, int D>
__device__ constexpr float scale() {
    return D == 64 ? 0.125f : 0.08838834764831845f;
}

// What both kernels do: a block holds its own tile of two tensors in registers, as operand A, and
// has the tiles of a list pass by in two stages.
template <class T, int D>
class Walk {
  public:
    __device__ Walk(const FineBackward& problem, unsigned char* shared)
        : problem_(problem), shared_(shared), stages_(cuda::shared_address(shared)) {}

    __device__ T* head(const Rows& tensor) const {
        return row_pointer<T>(tensor, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                              0);
    }
    __device__ Pair<T> pair(const Rows& first, const Rows& second) const {
        return {head(first), head(second), static_cast<int>(first.token),
                static_cast<int>(second.token)};
    }
    __device__ int64_t head_number() const {
        return static_cast<int64_t>(blockIdx.z) * problem_.heads + blockIdx.y;
    }
    __device__ int64_t query_number(int token) const {
        return head_number() * problem_.num_q_tokens + token;
    }
    __device__ int first_row() const { return thread_div(32) * kStep; }

    // Calls `work(stage, numbers, tile)` for each tile of the list, in warps that have rows of
    // `own`; `numbers` are the rows' log-sum-exp and delta if kNumbers.
    template <bool kNumbers, class Work>
    __device__ __forceinline__ void run(TileList list, Tile own, const Pair<T>& own_pair,
                                        const Pair<T>& pair, Work work) {
        const bool works = first_row() < own.tokens;
        Tile tile = list.next(0);
        copy<false>(1, own_pair, own);
        copy<kNumbers>(0, pair, tile);
        cuda::copy_async_wait<1>();
        __syncthreads();
        if (works) {
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
                load_a<D>(first_[step], stage(1), first_row(), step);
                load_a<D>(second_[step], stage(1) + kTileBytes<D>, first_row(), step);
            }
        }
        for (int i = 1; tile.tokens > 0; ++i) {
            const Tile next = list.next(i);
            // The tile is here, for all warps, and no warp reads the other stage any more.
            cuda::copy_async_wait<0>();
            __syncthreads();
            copy<kNumbers>(i % 2, pair, next);
            if (works) work(stage((i - 1) % 2), numbers((i - 1) % 2), tile);
            tile = next;
        }
        __syncthreads();
    }

    uint32_t first_[D / 16][4], second_[D / 16][4];

  private:
    __device__ uint32_t stage(int i) const { return stages_ + i * kStageBytes<D>; }
    __device__ RowNumbers* numbers(int i) const {
        return reinterpret_cast<RowNumbers*>(shared_ + 2 * kStageBytes<D>) + i;
    }

    template <bool kNumbers>
    __device__ __forceinline__ void copy(int i, const Pair<T>& pair, Tile tile) {
        if (tile.tokens > 0) {
            copy_tile<T, D>(stage(i), pair.first, pair.first_stride, tile);
            copy_tile<T, D>(stage(i) + kTileBytes<D>, pair.second, pair.second_stride, tile);
            if constexpr (kNumbers) {
                // Half of the threads copy lse, the others delta; past the tile, zeros.
                const int row = thread_mod(kTileRows);
                const bool is_lse = thread_div(kTileRows) == 0;
                const float* from = is_lse ? problem_.lse : problem_.delta;
                const uint32_t to = stages_ + 2 * kStageBytes<D> + i * sizeof(RowNumbers) +
                                    threadIdx.x * sizeof(float);
                cuda::copy_async_4(to, from + query_number(tile.first + row), row < tile.tokens);
            }
        }
        cuda::copy_async_commit();
    }

    const FineBackward& problem_;
    unsigned char* shared_;
    uint32_t stages_;
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    query_kernel(const __grid_constant__ FineBackward problem) {
    unsigned char* shared = cuda::dynamic_shared();
    Walk<T, D> walk(problem, shared);
    const Span span = span_of(problem.q_tiles, static_cast<int>(blockIdx.x), problem.num_q_tiles,
                              problem.num_q_tokens);
    const Tile own = span.tile;
    const int64_t list = walk.head_number() * problem.num_q_tiles + blockIdx.x;
    const int count = problem.counts ? clamp(problem.counts[list], 0, problem.k) : problem.k;

    // Of the lane's two rows; infinite where there is none, so that weights are 0.
    float lse_log2[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = walk.first_row() + lane_div(4) + 8 * half;
        const bool valid = row < own.tokens;
        const float lse = valid ? problem.lse[walk.query_number(own.first + row)] : -INFINITY;
        lse_log2[half] = lse == -INFINITY ? INFINITY : lse * kLog2E;
        delta[half] = valid ? problem.delta[walk.query_number(own.first + row)] : 0.0f;
    }

    float sums[D / 8][4] = {};
    const auto work = [&](uint32_t stage, const RowNumbers*, Tile tile) {
#pragma unroll 1
        for (int column = 0; column < tile.tokens; column += kStep) {
            const uint32_t keys = stage + column * D * 2, values = keys + kTileBytes<D>;
            float scores[2][4], gradients[2][4];
            multiply_channels<T, D>(scores, walk.first_, keys);
            multiply_channels<T, D>(gradients, walk.second_, values);
            const int last = tile.tokens - column - thread_mod(4) * 2;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float weight =
                        exp2_approx(scores[n][i] * (scale<T, D>() * kLog2E) - lse_log2[i / 2]);
                    if (n * 8 + i % 2 >= last) weight = 0.0f;
                    gradients[n][i] = weight * (gradients[n][i] - delta[i / 2]);
                }
            uint32_t a[4];
            pack_a<T>(a, gradients[0], gradients[1]);
            multiply_rows<T, D>(sums, a, keys);
        }
    };
    walk.template run<false>(TileList(problem.index + list * problem.k, count, problem.kv_tiles,
                                      problem.num_kv_tiles, problem.num_kv_tokens),
                             own, walk.pair(problem.q, problem.grad),
                             walk.pair(problem.k_rows, problem.v), work);

    T* out = walk.head(problem.dq);
    zero_padding<T, D>(span, out, problem.dq.token);
    write_rows<T, D>(sums, scale<T, D>(), scale<T, D>(), shared, out + own.first * problem.dq.token,
                     problem.dq.token, own.tokens, AsItIs());
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    key_kernel(const __grid_constant__ FineBackward problem) {
    unsigned char* shared = cuda::dynamic_shared();
    Walk<T, D> walk(problem, shared);
    const auto span_here = [&] {
        return span_of(problem.kv_tiles, static_cast<int>(blockIdx.x), problem.num_kv_tiles,
                       problem.num_kv_tokens);
    };
    const int entries = problem.num_q_tiles * problem.k;
    const int32_t* offsets =
        problem.offsets + walk.head_number() * (problem.num_kv_tiles + 1) + blockIdx.x;
    const int begin = clamp(offsets[0], 0, entries), end = clamp(offsets[1], begin, entries);

    float key_sums[D / 8][4] = {}, value_sums[D / 8][4] = {};
    const auto work = [&](uint32_t stage, const RowNumbers* numbers, Tile tile) {
#pragma unroll 1
        for (int column = 0; column < tile.tokens; column += kStep) {
            const uint32_t queries = stage + column * D * 2, grads = queries + kTileBytes<D>;
            // Transposed: rows are keys, columns are queries. What lies past the tile's tokens is
            // 0 in `queries` and `grads` and adds nothing.
            float weights[2][4], gradients[2][4];
            multiply_channels<T, D>(weights, walk.first_, queries);
            multiply_channels<T, D>(gradients, walk.second_, grads);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int query = column + n * 8 + thread_mod(4) * 2;
                const auto lse = cuda::load<float2>(numbers->lse + query);
                const auto delta = cuda::load<float2>(numbers->delta + query);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    weights[n][i] = exp2_approx(weights[n][i] * (scale<T, D>() * kLog2E) -
                                                (i % 2 ? lse.y : lse.x) * kLog2E);
                    gradients[n][i] =
                        weights[n][i] * (gradients[n][i] - (i % 2 ? delta.y : delta.x));
                }
            }
            uint32_t a[4];
            pack_a<T>(a, weights[0], weights[1]);
            multiply_rows<T, D>(value_sums, a, grads);
            pack_a<T>(a, gradients[0], gradients[1]);
            multiply_rows<T, D>(key_sums, a, queries);
        }
    };
    walk.template run<true>(
        TileList(problem.rows + walk.head_number() * entries + begin, end - begin, problem.q_tiles,
                 problem.num_q_tiles, problem.num_q_tokens),
        span_here().tile, walk.pair(problem.k_rows, problem.v), walk.pair(problem.q, problem.grad),
        work);

    // Looked up anew rather than held: registers are short.
    const Span span = span_here();
    const Tile own = span.tile;
    T* dk = walk.head(problem.dk);
    T* dv = walk.head(problem.dv);
    zero_padding<T, D>(span, dk, problem.dk.token);
    zero_padding<T, D>(span, dv, problem.dv.token);
    write_rows<T, D>(key_sums, scale<T, D>(), scale<T, D>(), shared,
                     dk + own.first * problem.dk.token, problem.dk.token, own.tokens, AsItIs());
    write_rows<T, D>(value_sums, 1.0f, 1.0f, shared + kStageBytes<D>,
                     dv + own.first * problem.dv.token, problem.dv.token, own.tokens, AsItIs());
}

}  // namespace

void backward_mma(const FineBackward& problem, cuda::Stream stream) {
    backward_delta(problem, stream);
    dispatch(problem, [&]<class K>(K) {
        using T = typename K::Element;
        constexpr int D = K::kHeadDim;
        cuda::launch(query_kernel<T, D>, dim3(problem.num_q_tiles, problem.heads, problem.batch),
                     kThreads, kSharedBytes<D>, stream, problem);
        cuda::launch(key_kernel<T, D>, dim3(problem.num_kv_tiles, problem.heads, problem.batch),
                     kThreads, kSharedBytes<D>, stream, problem);
    });
}

}  // namespace fastvideo::vsa
