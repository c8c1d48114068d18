// SPDX-License-Identifier: Apache-2.0
// Forward pass of the fine attention by Hopper's own instructions.
//
// A block has three consumers, warpgroups with a query tile of their own each, and one producer.
// For a pair of 64x128 tiles the tensor cores of a multiprocessor are busy for 512 clocks (4096
// FLOP per clock) and its exponentials take 256 (16 per clock). A consumer by itself does one after
// the other, with latencies in between, and keeps the tensor cores busy half of the time; three do
// most of it, so products need not overlap the softmax within a consumer. That fits 160 registers
// with Q among them, and a consumer never waits for a stage while it holds one, which could
// deadlock in a ring that consumers share.
//
// With Q and P in registers a product reads 64 bytes of shared memory per clock and copies write up
// to 64 more, of 128 that there are; with Q in shared memory Q K^T alone would read 128.
#include "cuda/launch.h"
#include "vsa/fine_cuda.h"
#include "vsa/fragments_sm90.cuh"
#include "vsa/maps_sm90.h"

namespace fastvideo::vsa {

namespace sm90 {
namespace {

constexpr int kConsumers = 3;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
// 128 * 32 + 384 * 160 = 65536, all there are.
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
// The running maximum of a row may lag behind by a factor of 2^8, for which both formats and sums
// in float32 have room; so most tiles need no rescaling of the output.
constexpr float kLag = 8.0f;

template <int D>
constexpr int kStages = (kMaxSharedBytes - kBytesOfRing) / (2 * kTileBytes<D>);

// A query tile's softmax so far; each thread has two rows.
struct Softmax {
    float maximum[2] = {-INFINITY, -INFINITY};  // of scores without the scale
    float sum[2] = {0.0f, 0.0f};                // of the thread's columns

    // Scores become weights; `out` is rescaled if a maximum moved.
    template <int columns, int n, int m>
    __device__ __forceinline__ void update(float (&s)[n], float (&out)[m], float scale_log2) {
        float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int i = 0; i < columns / 2; ++i) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s[i]);
        bool moves = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            highest[half] = over_quad(highest[half], [](float a, float b) { return fmaxf(a, b); });
            moves |= (highest[half] - maximum[half]) * scale_log2 > kLag;
        }
        if (__any_sync(cuda::kAllLanes, moves)) {
            float factor[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                factor[half] = cuda::exp2_approx((maximum[half] - highest[half]) * scale_log2);
                maximum[half] = highest[half];
                sum[half] *= factor[half];
            }
#pragma unroll
            for (int i = 0; i < m; ++i) out[i] *= factor[i / 2 % 2];
        }
        const float offset[2] = {maximum[0] * scale_log2, maximum[1] * scale_log2};
#pragma unroll
        for (int i = 0; i < columns / 2; ++i) {
            s[i] = cuda::exp2_approx(s[i] * scale_log2 - offset[i / 2 % 2]);
            sum[i / 2 % 2] += s[i];
        }
    }

    // Over the four threads of a row.
    template <class Combine>
    static __device__ __forceinline__ float over_quad(float value, Combine combine) {
        value = combine(value, __shfl_xor_sync(cuda::kAllLanes, value, 1));
        return combine(value, __shfl_xor_sync(cuda::kAllLanes, value, 2));
    }
};

// Attends to the key tile of a stage.
template <class T, int D, int kSteps>
__device__ __forceinline__ void attend(Softmax& softmax, float (&out)[D / 2],
                                       const uint32_t (&q)[D / 16][4], uint32_t k_tile,
                                       uint32_t v_tile, int tokens, float scale_log2) {
    float s[8 * kSteps];
    uint32_t weights[kSteps][4];
    cuda::wgmma_fence();
    start_over_channels<T, D, kSteps>(s, q, k_tile);
    cuda::wgmma_wait<0>();
    cuda::pin(s);
    if (tokens < kStep * kSteps) {
#pragma unroll
        for (int i = 8 * (kSteps - 1); i < 8 * kSteps; ++i)
            if (i / 4 * 8 + first_column() + i % 2 >= tokens) s[i] = -INFINITY;
    }
    softmax.update<kStep * kSteps>(s, out, scale_log2);
    pack_operand<T>(weights, s);
    start_over_rows<T, D, kSteps>(out, weights, v_tile);
    cuda::wgmma_wait<0>();
    cuda::pin(out);
}

// out / sum + coarse * gate and the log-sum-exp of a query tile.
template <class T, int D>
__device__ __forceinline__ void store_results(const FineForward& p, int batch, int head, int q_tile,
                                              Tile tile, Softmax& softmax,
                                              const float (&out)[D / 2], float scale) {
    const int64_t plane = static_cast<int64_t>(batch) * p.heads + head;
    const float* coarse =
        p.coarse ? p.coarse + (plane * p.num_q_tiles + q_tile) * D + first_column() : nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum =
            Softmax::over_quad(softmax.sum[half], [](float a, float b) { return a + b; });
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        const int row = first_row() + 8 * half;
        if (row >= tile.tokens) continue;
        const int token = tile.first + row;
        if (threadIdx.x % 4 == 0)
            p.lse[plane * p.num_q_tokens + token] = softmax.maximum[half] * scale + logf(sum);
        T* to = row_of<T>(p.out, batch, head, token) + first_column();
        const T* gate =
            p.gate.data ? row_of<T>(p.gate, batch, head, token) + first_column() : nullptr;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            float2 value = {out[4 * i + 2 * half] * factor, out[4 * i + 2 * half + 1] * factor};
            if (coarse) {
                const float2 added = cuda::load<float2>(coarse + 8 * i);
                const float2 weight =
                    gate ? cuda::unpack<T>(cuda::load<uint32_t>(gate + 8 * i)) : float2{1.0f, 1.0f};
                value.x += added.x * weight.x;
                value.y += added.y * weight.y;
            }
            cuda::store(to + 8 * i, cuda::pack<T>(value.x, value.y));
        }
    }
    clear_padding(p.q_tiles, q_tile, p.num_q_tiles, p.num_q_tokens, [&](int token) {
        clear_row<T, D>(p.out, batch, head, token);
        if (threadIdx.x % kWarp == 0) p.lse[plane * p.num_q_tokens + token] = -INFINITY;
    });
}

// An item is three neighbouring query tiles of a head.
struct Item {
    int batch, head, first_tile;

    __device__ __forceinline__ Item(const Problem& p, int item) {
        const int per_head = (p.num_q_tiles + kConsumers - 1) / kConsumers;
        first_tile = item % per_head * kConsumers;
        head = item / per_head % p.heads;
        batch = item / per_head / p.heads;
    }
};

// Row of `index` of a query tile, and how much of it counts.
__device__ __forceinline__ int64_t row_of_index(const Problem& p, const Item& item, int q_tile) {
    return (static_cast<int64_t>(item.batch) * p.heads + item.head) * p.num_q_tiles + q_tile;
}
__device__ __forceinline__ int count_of(const Problem& p, const Item& item, int q_tile) {
    if (q_tile >= p.num_q_tiles) return 0;
    return p.counts ? min(max(p.counts[row_of_index(p, item, q_tile)], 0), p.k) : p.k;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ TileMaps k_maps, const __grid_constant__ TileMaps v_maps,
                   const __grid_constant__ FineForward p, const int items) {
    unsigned char* stages = cuda::dynamic_shared();
    auto& ring = *reinterpret_cast<Ring<kStages<D>>*>(stages + kMaxSharedBytes - kBytesOfRing);
    ring.init(1, kConsumers);
    cuda::fence_mbarrier_init();
    __syncthreads();

    const int warpgroup = __shfl_sync(cuda::kAllLanes, threadIdx.x / kWarpgroup, 0);
    const uint32_t first_stage = cuda::shared_address(stages);
    if (warpgroup == 0) {
        cuda::keep_registers<kProducerRegisters>();
        const int warp = __shfl_sync(cuda::kAllLanes, threadIdx.x / kWarp, 0);
        if (warp == 0) {
            const auto begin = [&](int number, Union<kConsumers>& walk) {
                const Item item(p, number);
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) {
                    const int q_tile = item.first_tile + i;
                    walk.set(i, p.index + row_of_index(p, item, q_tile) * p.k,
                             count_of(p, item, q_tile), p.num_kv_tiles);
                }
            };
            const auto copy = [&](int number, int kv_tile, int stage) {
                if (threadIdx.x % kWarp != 0) return;
                const Item item(p, number);
                const Tile tile = tile_at(p.kv_tiles, kv_tile, p.num_kv_tokens);
                ring.tokens[stage] = tile.tokens;
                cuda::arrive_expecting(ring.landed[stage], 2 * bytes_of<D>(tile.tokens));
                const uint32_t k_tile = first_stage + stage * 2 * kTileBytes<D>;
                copy_tile<D>(k_tile, k_maps, tile, item.head, item.batch, ring.landed[stage]);
                copy_tile<D>(k_tile + kTileBytes<D>, v_maps, tile, item.head, item.batch,
                             ring.landed[stage]);
            };
            produce<kConsumers>(ring, items, begin, copy);
        } else if (warp == 1) {
            zero_ends<D>(ring, stages);
        }
    } else {
        cuda::take_registers<kConsumerRegisters>();
        const float scale_log2 = kScale<D> * kLog2OfE;
        Consumer<kStages<D>> consumer(ring, warpgroup - 1);
        for (int number = blockIdx.x; number < items; number += gridDim.x) {
            const Item item(p, number);
            const int q_tile = item.first_tile + warpgroup - 1;
            if (q_tile >= p.num_q_tiles) continue;
            const Tile tile = tile_at(p.q_tiles, q_tile, p.num_q_tokens);
            uint32_t q[D / 16][4];
            load_operand<T, D>(q, p.q, item.batch, item.head, tile);
            Softmax softmax;
            float out[D / 2] = {};
            consumer.take(count_of(p, item, q_tile), [&](int stage, int tokens) {
                const uint32_t k_tile = first_stage + stage * 2 * kTileBytes<D>;
                with_steps_of(tokens, [&](auto steps) {
                    attend<T, D, decltype(steps)::kSteps>(
                        softmax, out, q, k_tile, k_tile + kTileBytes<D>, tokens, scale_log2);
                });
            });
            store_results<T, D>(p, item.batch, item.head, q_tile, tile, softmax, out, kScale<D>);
        }
        consumer.finish();
    }
}

template <class T, int D>
void launch_forward(const FineForward& p, cuda::Stream stream) {
    const int items = p.batch * p.heads * ((p.num_q_tiles + kConsumers - 1) / kConsumers);
    // Blocks stay for several items: the next tiles arrive while the last results leave.
    const unsigned blocks = std::min(items, cuda::num_multiprocessors());
    cuda::launch(forward_kernel<T, D>, dim3(blocks), dim3(kThreads), kMaxSharedBytes, stream,
                 map_tiles("k", p.k_rows, p, p.num_kv_tokens),
                 map_tiles("v", p.v, p, p.num_kv_tokens), p, items);
}

}  // namespace
}  // namespace sm90

void forward_sm90(const FineForward& p, cuda::Stream stream) {
    if (p.is_bf16)
        p.head_dim == 64 ? sm90::launch_forward<cuda::BFloat16, 64>(p, stream)
                         : sm90::launch_forward<cuda::BFloat16, 128>(p, stream);
    else
        p.head_dim == 64 ? sm90::launch_forward<cuda::Float16, 64>(p, stream)
                         : sm90::launch_forward<cuda::Float16, 128>(p, stream);
}

}  // namespace fastvideo::vsa
