// SPDX-License-Identifier: Apache-2.0
// Means over the tokens of each tile, and their gradient: a warp for each tile of a head.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cuda/channels.h"
#include "cuda/launch.h"
#include "vsa/checks.h"

namespace fastvideo::vsa {

namespace {

using namespace fastvideo::cuda;

constexpr int kWarps = 4;

struct Pool {
    Rows x;        // tokens; the gradient of them in the backward
    float* means;  // (B,H,tiles,D), or their gradient
    const Tile* tiles;
    int batch, heads, num_tiles, num_tokens, head_dim;
    int lanes;  // that share a token eight channels each; 0: channels are taken one by one

    __host__ __device__ int64_t num_warps() const {
        return static_cast<int64_t>(batch) * heads * num_tiles;
    }
};

// What a warp works on. Tables are made to fit the tokens, as no one has looked at their values.
struct Work {
    int64_t of_all;
    int tile, head, sample;
    int first, tokens;  // of the tile
    int begin, end;     // of what the tile owns: also the padding before the first, and after it

    __device__ __forceinline__ Work(const Pool& p, int64_t warp) : of_all(warp) {
        tile = static_cast<int>(warp % p.num_tiles);
        head = static_cast<int>(warp / p.num_tiles % p.heads);
        sample = static_cast<int>(warp / p.num_tiles / p.heads);
        first = max(0, min(p.tiles[tile].first, p.num_tokens));
        tokens = max(0, min(p.tiles[tile].tokens, p.num_tokens - first));
        begin = tile == 0 ? 0 : first;
        end = tile + 1 == p.num_tiles ? p.num_tokens : min(p.tiles[tile + 1].first, p.num_tokens);
    }
};

template <class T>
__device__ __forceinline__ T* head_of(const Pool& p, const Work& work) {
    return static_cast<T*>(p.x.data) + work.sample * p.x.batch + work.head * p.x.head;
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) pool_kernel(const __grid_constant__ Pool p) {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (warp >= p.num_warps()) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Work work(p, warp);
    const T* const x = head_of<const T>(p, work) + work.first * p.x.token;
    float* const mean = p.means + work.of_all * p.head_dim;
    const float weight = 1.0f / static_cast<float>(max(1, work.tokens));

    if (p.lanes == 0) {
        for (int channel = lane; channel < p.head_dim; channel += 32) {
            float sum = 0.0f;
            for (int token = 0; token < work.tokens; ++token)
                sum += to_float(x[token * p.x.token + channel]);
            mean[channel] = sum * weight;
        }
        return;
    }
    const int channel = lane % p.lanes * kEight;
    Float8 sum = filled(0.0f);
#pragma unroll 8
    for (int token = lane / p.lanes; token < work.tokens; token += 32 / p.lanes) {
        const Float8 some = load_eight(x + token * p.x.token + channel);
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum.at[e] += some.at[e];
    }
    for (int flip = p.lanes; flip < 32; flip *= 2)
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum.at[e] += __shfl_xor_sync(kAllLanes, sum.at[e], flip);
#pragma unroll
    for (int e = 0; e < kEight; ++e) sum.at[e] *= weight;
    if (lane < p.lanes) store_sums(mean + channel, sum);
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    pool_backward_kernel(const __grid_constant__ Pool p) {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (warp >= p.num_warps()) return;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Work work(p, warp);
    T* const x = head_of<T>(p, work);
    const float* const grad = p.means + work.of_all * p.head_dim;
    const float weight = 1.0f / static_cast<float>(max(1, work.tokens));
    auto is_inside = [&](int token) {
        return token >= work.first && token < work.first + work.tokens;
    };

    if (p.lanes == 0) {
        for (int channel = lane; channel < p.head_dim; channel += 32) {
            const T share = from_float<T>(grad[channel] * weight);
            for (int token = work.begin; token < work.end; ++token)
                x[token * p.x.token + channel] = is_inside(token) ? share : from_float<T>(0.0f);
        }
        return;
    }
    const int channel = lane % p.lanes * kEight;
    Float8 share = load_eight(grad + channel);
#pragma unroll
    for (int e = 0; e < kEight; ++e) share.at[e] *= weight;
    for (int token = work.begin + lane / p.lanes; token < work.end; token += 32 / p.lanes)
        store_eight(x + token * p.x.token + channel, is_inside(token) ? share : filled(0.0f));
}

// ---- operators ---------------------------------------------------------------------------------

bool are_in_eights(const Tensor& x) {
    for (int64_t i = 0; i < 3; ++i)
        if (x.stride(i) % kEight) return false;
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// `x` is (B,H,S,D) with dense rows, `means` (B,H,tiles,D) and `tiles` are contiguous.
Pool pool_of(const Tensor& x, const Tensor& means, const Tensor& tiles) {
    Pool p;
    p.x = {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
    p.means = const_cast<float*>(means.const_data_ptr<float>());
    p.tiles = static_cast<const Tile*>(tiles.const_data_ptr());
    p.batch = static_cast<int>(x.size(0));
    p.heads = static_cast<int>(x.size(1));
    p.num_tiles = static_cast<int>(tiles.size(0));
    p.num_tokens = static_cast<int>(x.size(2));
    p.head_dim = static_cast<int>(x.size(3));
    const int lanes = p.head_dim / kEight;
    const bool divides_warp = p.head_dim % kEight == 0 && 32 % lanes == 0;
    p.lanes = divides_warp && are_in_eights(x) && are_in_eights(means) ? lanes : 0;
    return p;
}

void launch_pool(void (*kernel)(Pool), const Pool& p, Stream stream) {
    const int64_t blocks = (p.num_warps() + kWarps - 1) / kWarps;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "vsa_pool: ", p.num_warps(), " tiles, expected at most ",
                    static_cast<int64_t>(INT32_MAX) * kWarps);
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kWarps * 32), 0, stream, p);
}

Tensor vsa_pool(Tensor x, Tensor tiles) {
    check_pool(x, tiles);
    const OnDeviceOf device(x);
    x = with_dense_rows(x);
    tiles = torch::stable::contiguous(tiles);
    Tensor means = torch::stable::new_empty(x, {x.size(0), x.size(1), tiles.size(0), x.size(3)},
                                            ScalarType::Float);
    launch_pool(x.scalar_type() == ScalarType::Float      ? pool_kernel<float>
                : x.scalar_type() == ScalarType::BFloat16 ? pool_kernel<BFloat16>
                                                          : pool_kernel<Float16>,
                pool_of(x, means, tiles), device.stream());
    return means;
}

Tensor vsa_pool_backward(Tensor grad, Tensor tiles, int64_t num_tokens, ScalarType dtype) {
    check_pool_backward(grad, tiles, num_tokens, dtype);
    const OnDeviceOf device(grad);
    grad = torch::stable::contiguous(grad);
    tiles = torch::stable::contiguous(tiles);
    Tensor dx = torch::stable::new_empty(
        grad, {grad.size(0), grad.size(1), num_tokens, grad.size(3)}, dtype);
    launch_pool(dtype == ScalarType::Float      ? pool_backward_kernel<float>
                : dtype == ScalarType::BFloat16 ? pool_backward_kernel<BFloat16>
                                                : pool_backward_kernel<Float16>,
                pool_of(dx, grad, tiles), device.stream());
    return dx;
}

}  // namespace

FASTVIDEO_CUDA_IMPL(m) {
    m.impl("vsa_pool", TORCH_BOX(&vsa_pool));
    m.impl("vsa_pool_backward", TORCH_BOX(&vsa_pool_backward));
}

}  // namespace fastvideo::vsa
