// SPDX-License-Identifier: Apache-2.0
// What the backward of the fine attention needs first: delta, the sum over channels of grad times
// the attention's own output, and on the way the gradients of coarse and gate.

#include "vsa/fine_cuda.h"
#include "vsa/fine_mma.cuh"

namespace fastvideo::vsa {

namespace {

template <int D>
inline constexpr int kSharedBytes = kThreads * kChunk * 4;

// A block takes a query tile of a head, D / 8 threads a row.
template <class T, int D>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const __grid_constant__ FineBackward problem) {
    constexpr int kChunks = D / kChunk, kRowsAtOnce = kThreads / kChunks;
    const int tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y),
              batch = static_cast<int>(blockIdx.z);
    const Span span = span_of(problem.q_tiles, tile, problem.num_q_tiles, problem.num_q_tokens);
    const int channel = thread_mod(kChunks) * kChunk;
    const int64_t head_number = static_cast<int64_t>(batch) * problem.heads + head;
    const int64_t means = (head_number * problem.num_q_tiles + tile) * D;
    float* delta = problem.delta + head_number * problem.num_q_tokens;
    const auto chunk_of = [&](const Rows& tensor, int token) {
        return row_pointer<T>(tensor, batch, head, token) + channel;
    };

    float coarse[kChunk] = {}, coarse_gradient[kChunk] = {};
    if (problem.coarse)
        for (int i = 0; i < kChunk; ++i) coarse[i] = problem.coarse[means + channel + i];
    for (int first = 0; first < span.tile.tokens; first += kRowsAtOnce) {
        const int row = first + thread_div(kChunks);
        const int token = span.tile.first + row;
        float sum = 0.0f;
        if (row < span.tile.tokens) {
            float grad[kChunk], out[kChunk], gate[kChunk] = {1, 1, 1, 1, 1, 1, 1, 1};
            load_chunk<T>(grad, chunk_of(problem.grad, token));
            load_chunk<T>(out, chunk_of(problem.out, token));
            if (problem.gate.data) {
                load_chunk<T>(gate, chunk_of(problem.gate, token));
                uint32_t pairs[4];
                for (int i = 0; i < 4; ++i)
                    pairs[i] = cuda::pack<T>(grad[2 * i] * coarse[2 * i],
                                             grad[2 * i + 1] * coarse[2 * i + 1]);
                cuda::store(chunk_of(problem.dgate, token),
                            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
            }
            for (int i = 0; i < kChunk; ++i) {
                sum += grad[i] * (out[i] - coarse[i] * gate[i]);
                coarse_gradient[i] += grad[i] * gate[i];
            }
        }
#pragma unroll
        for (int flip = 1; flip < kChunks; flip *= 2)
            sum += __shfl_xor_sync(cuda::kAllLanes, sum, flip);
        if (row < span.tile.tokens && channel == 0) delta[token] = sum;
    }
    if (problem.gate.data)
        zero_padding<T, D>(span, row_pointer<T>(problem.dgate, batch, head, 0),
                           problem.dgate.token);
    if (!problem.coarse) return;
    // Each thread has summed some of the rows; their sums are added in the order of the rows.
    auto* shared = reinterpret_cast<float*>(cuda::dynamic_shared());
    for (int i = 0; i < kChunk; ++i)
        shared[thread_div(kChunks) * D + channel + i] = coarse_gradient[i];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= D) return;
    float sum = 0.0f;
    for (int i = 0; i < kRowsAtOnce; ++i) sum += shared[i * D + static_cast<int>(threadIdx.x)];
    problem.dcoarse[means + threadIdx.x] = sum;
}

}  // namespace

void backward_delta(const FineBackward& problem, cuda::Stream stream) {
    dispatch(problem, [&]<class K>(K) {
        using T = typename K::Element;
        constexpr int D = K::kHeadDim;
        const dim3 grid(problem.num_q_tiles, problem.heads, problem.batch);
        cuda::launch(delta_kernel<T, D>, grid, kThreads, kSharedBytes<D>, stream, problem);
    });
}

}  // namespace fastvideo::vsa
