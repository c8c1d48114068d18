// SPDX-License-Identifier: Apache-2.0
// Forward of the fine attention by mma.sync: softmax over the key tiles of a list, kept up tile by
// tile in base 2.

#include "vsa/fine_cuda.h"
#include "vsa/fine_mma.cuh"

namespace fastvideo::vsa {

namespace {

using cuda::exp2_approx;

// Three slots hold a key or a value tile each: one is worked on while the next two arrive.
constexpr int kSlots = 3;

// The softmax so far of a lane's two rows, lane / 4 and 8 below. Sums are of this lane's columns.
struct Softmax {
    float max[2] = {-INFINITY, -INFINITY};  // of the scores, not yet scaled
    float sum[2] = {0.0f, 0.0f};
};

// Scores become weights, relative to the new maximum; `rescale` makes older ones relative to it.
template <int kBlocks>
__device__ __forceinline__ void add_scores(Softmax& softmax, float (&scores)[kBlocks][4],
                                           float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = softmax.max[half];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
            largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(cuda::kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(cuda::kAllLanes, largest, 2));
        // Scores that are all minus infinity weigh nothing rather than NaN.
        const float base = largest == -INFINITY ? 0.0f : largest * scale_log2;
        rescale[half] = exp2_approx(softmax.max[half] * scale_log2 - base);
        softmax.max[half] = largest;
        float sum = softmax.sum[half] * rescale[half];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n)
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                scores[n][i] = exp2_approx(scores[n][i] * scale_log2 - base);
                sum += scores[n][i];
            }
        softmax.sum[half] = sum;
    }
}

template <class T, int D>
class Forward {
  public:
    __device__ Forward(const FineForward& problem, unsigned char* shared)
        : problem_(problem),
          shared_(shared),
          keys_(cuda::shared_address(shared)),
          values_(keys_ + kTileBytes<D>),
          free_(values_ + kTileBytes<D>),
          tokens_(span().tile.tokens) {}

    __device__ void run() {
        TileList list(problem_.index + list_number() * problem_.k, count(), problem_.kv_tiles,
                      problem_.num_kv_tiles, problem_.num_kv_tokens);
        Tile tile = list.next(0);
        copy(free_, problem_.q, span().tile);
        copy(keys_, problem_.k_rows, tile);
        copy(values_, problem_.v, tile);
        load_queries();
        for (int i = 1; tile.tokens > 0; ++i) {
            const Tile next = list.next(i);
            attend(tile, next);
            const uint32_t keys = keys_;
            keys_ = free_;
            free_ = values_;
            values_ = keys;
            tile = next;
        }
        finish();
    }

  private:
    __device__ int64_t list_number() const {
        return (static_cast<int64_t>(blockIdx.z) * problem_.heads + blockIdx.y) *
                   problem_.num_q_tiles +
               blockIdx.x;
    }
    __device__ int count() const {
        return problem_.counts ? clamp(problem_.counts[list_number()], 0, problem_.k) : problem_.k;
    }
    __device__ T* rows(const Rows& tensor, int token) const {
        return row_pointer<T>(tensor, static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                              token);
    }
    // Looked up anew where it is used, rather than held all the while.
    __device__ Span span() const {
        return span_of(problem_.q_tiles, static_cast<int>(blockIdx.x), problem_.num_q_tiles,
                       problem_.num_q_tokens);
    }
    __device__ int first_row() const { return thread_div(32) * kStep; }
    // Whether the warp has any rows to compute.
    __device__ bool works() const { return first_row() < tokens_; }

    // Begins a copy of a tile (of none, where it has no tokens) as one group.
    __device__ void copy(uint32_t slot, const Rows& tensor, Tile tile) {
        if (tile.tokens > 0)
            copy_tile<T, D>(slot, rows(tensor, 0), static_cast<int>(tensor.token), tile);
        cuda::copy_async_commit();
    }

    __device__ void load_queries() {
        cuda::copy_async_wait<2>();  // the first keys and values may still be under way
        __syncthreads();
        if (!works()) return;
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
            load_a<D>(queries_[step], free_, first_row(), step);
    }

    // Takes in a tile while the next one is copied.
    __device__ __forceinline__ void attend(Tile tile, Tile next) {
        const int steps = works() ? steps_of(tile.tokens) : 0;
        uint32_t weights[4][4];
        // The keys are here, for all warps, and no warp reads the free slot any more.
        cuda::copy_async_wait<1>();
        __syncthreads();
        copy(free_, problem_.k_rows, next);
        switch (steps) {
            case 1:
                weigh<1>(weights, tile.tokens);
                break;
            case 2:
                weigh<2>(weights, tile.tokens);
                break;
            case 3:
                weigh<3>(weights, tile.tokens);
                break;
            case 4:
                weigh<4>(weights, tile.tokens);
        }
        // The same of the values and of the slot of the keys just used.
        cuda::copy_async_wait<1>();
        __syncthreads();
        copy(keys_, problem_.v, next);
#pragma unroll
        for (int step = 0; step < 4; ++step)
            if (step < steps) multiply_rows<T, D>(sums_, weights[step], values_, step * kStep);
    }

    // `weights` of 16 * kSteps tokens.
    template <int kSteps>
    __device__ __forceinline__ void weigh(uint32_t (&weights)[4][4], int tokens) {
        float scores[2 * kSteps][4];
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
#pragma unroll
        for (int channels = 0; channels < D / 16; ++channels)
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32_t b[4];
                load_b<D>(b, keys_, step * kStep, channels);
                cuda::mma<T>(scores[2 * step], queries_[channels], b[0], b[1]);
                cuda::mma<T>(scores[2 * step + 1], queries_[channels], b[2], b[3]);
            }
        if (tokens < kSteps * kStep) {
            const int lane = thread_mod(32);
#pragma unroll
            for (int n = 2 * kSteps - 2; n < 2 * kSteps; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (n * 8 + lane % 4 * 2 + i % 2 >= tokens) scores[n][i] = -INFINITY;
        }
        float rescale[2];
        add_scores(softmax_, scores, scale() * kLog2E, rescale);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums_[n][i] *= rescale[i / 2];
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
            pack_a<T>(weights[step], scores[2 * step], scores[2 * step + 1]);
    }

    __device__ static constexpr float scale() { return D == 64 ? 0.125f : 0.08838834764831845f; }

    __device__ void finish() {
        const int lane = thread_mod(32);
        const Span span = this->span();
        float* lse =
            problem_.lse + (static_cast<int64_t>(blockIdx.z) * problem_.heads + blockIdx.y) *
                               problem_.num_q_tokens;
        T* out = rows(problem_.out, 0);
        zero_padding<T, D>(span, out, problem_.out.token);
        for_padding<D>(span, [&](int token) { lse[token] = -INFINITY; });
        __syncthreads();  // no warp reads values any more
        if (!works()) return;
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = softmax_.sum[half];
            sum += __shfl_xor_sync(cuda::kAllLanes, sum, 1);
            sum += __shfl_xor_sync(cuda::kAllLanes, sum, 2);
            inverse[half] = sum > 0.0f ? 1.0f / sum : 0.0f;
            const int row = first_row() + lane / 4 + 8 * half;
            if (lane % 4 == 0 && row < tokens_)
                lse[span.tile.first + row] =
                    sum > 0.0f ? softmax_.max[half] * scale() + cuda::log2_approx(sum) * kLn2
                               : -INFINITY;
        }
        const int first = span.tile.first;
        const float* coarse =
            problem_.coarse ? problem_.coarse + list_number() * D + lane % (D / kChunk) * kChunk
                            : nullptr;
        const T* gate = problem_.gate.data ? rows(problem_.gate, first) : nullptr;
        write_rows<T, D>(
            sums_, inverse[0], inverse[1], shared_, out + first * problem_.out.token,
            problem_.out.token, tokens_, [&](float (&values)[kChunk], int row, int chunk) {
                if (!coarse) return;
                float gates[kChunk] = {1, 1, 1, 1, 1, 1, 1, 1};
                if (gate) load_chunk<T>(gates, gate + row * problem_.gate.token + chunk * kChunk);
#pragma unroll
                for (int i = 0; i < kChunk; ++i) values[i] += coarse[i] * gates[i];
            });
    }

    const FineForward& problem_;
    unsigned char* shared_;
    uint32_t keys_, values_, free_;  // slots
    int tokens_;
    uint32_t queries_[D / 16][4];
    float sums_[D / 8][4] = {};
    Softmax softmax_;
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, D == 128 ? 3 : 4)
    forward_kernel(const __grid_constant__ FineForward problem) {
    Forward<T, D>(problem, cuda::dynamic_shared()).run();
}

}  // namespace

void forward_mma(const FineForward& problem, cuda::Stream stream) {
    dispatch(problem, [&]<class K>(K) {
        using T = typename K::Element;
        constexpr int D = K::kHeadDim;
        // Query tiles of a head run side by side: they share key tiles in the L2 cache.
        const dim3 grid(problem.num_q_tiles, problem.heads, problem.batch);
        cuda::launch(forward_kernel<T, D>, grid, kThreads, kSlots * kTileBytes<D>, stream, problem);
    });
}

}  // namespace fastvideo::vsa
