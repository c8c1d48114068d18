// SPDX-License-Identifier: Apache-2.0
// Backward pass of the fine attention by Hopper's own instructions: one kernel for the gradient of
// queries, which walks the key tiles of query tiles, and one for those of keys and values, which
// walks the query tiles of key tiles. Seven products instead of five, and no atomics.
//
// Both have two consumers with up to 240 registers, in whose order of work the exponentials of a
// pair of tiles (256 clocks) run beside dP (256 clocks of the tensor cores), and so does dS beside
// the product with P where there is one.
#include "cuda/launch.h"
#include "vsa/fine_cuda.h"
#include "vsa/fragments_sm90.cuh"
#include "vsa/maps_sm90.h"

namespace fastvideo::vsa {

namespace sm90 {
namespace {

constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
// 128 * 24 + 256 * 240 = 384 * 168, which a launch with these bounds gets.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// An item is two neighbouring tiles of a head.
struct Item {
    int batch, head, first_tile;

    __device__ __forceinline__ Item(const Problem& p, int item, int tiles) {
        const int per_head = (tiles + kConsumers - 1) / kConsumers;
        first_tile = item % per_head * kConsumers;
        head = item / per_head % p.heads;
        batch = item / per_head / p.heads;
    }
    __device__ __forceinline__ int64_t plane(const Problem& p) const {
        return static_cast<int64_t>(batch) * p.heads + head;
    }
};

// ---- gradient of queries -----------------------------------------------------------------------

template <int D>
constexpr int kStagesOfQueries = (kMaxSharedBytes - kBytesOfRing) / (2 * kTileBytes<D>);

// The list of a query tile: a part of a row of `index`.
struct List {
    const int32_t* entries;
    int length;
};
__device__ __forceinline__ List list_of_query_tile(const Problem& p, const Item& item, int tile) {
    if (tile >= p.num_q_tiles) return {p.index, 0};
    const int64_t row = item.plane(p) * p.num_q_tiles + tile;
    return {p.index + row * p.k, p.counts ? min(max(p.counts[row], 0), p.k) : p.k};
}

// dq += dS K of the key tile of a stage, without the scale.
template <class T, int D, int kSteps>
__device__ __forceinline__ void add_queries(float (&dq)[D / 2], const uint32_t (&q)[D / 16][4],
                                            const uint32_t (&grad)[D / 16][4], uint32_t k_tile,
                                            uint32_t v_tile, int tokens, const float (&lse)[2],
                                            const float (&delta)[2], float scale_log2) {
    float s[8 * kSteps], dp[8 * kSteps];
    uint32_t ds[kSteps][4];
    cuda::wgmma_fence();
    start_over_channels<T, D, kSteps>(s, q, k_tile);
    start_over_channels<T, D, kSteps>(dp, grad, v_tile);
    cuda::wgmma_wait<1>();
    cuda::pin(s);
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i)
        s[i] = cuda::exp2_approx(s[i] * scale_log2 - lse[i / 2 % 2]);
    cuda::wgmma_wait<0>();
    cuda::pin(dp);
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) s[i] *= dp[i] - delta[i / 2 % 2];
    // Past the tokens keys are 0, but P may be infinite.
#pragma unroll
    for (int i = 8 * (kSteps - 1); i < 8 * kSteps; ++i)
        s[i] = i / 4 * 8 + first_column() + i % 2 < tokens ? s[i] : 0.0f;
    pack_operand<T>(ds, s);
    start_over_rows<T, D, kSteps>(dq, ds, k_tile);
    cuda::wgmma_wait<0>();
    cuda::pin(dq);
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    backward_queries_kernel(const __grid_constant__ TileMaps k_maps,
                            const __grid_constant__ TileMaps v_maps,
                            const __grid_constant__ FineBackward p, const int items) {
    unsigned char* stages = cuda::dynamic_shared();
    auto& ring =
        *reinterpret_cast<Ring<kStagesOfQueries<D>>*>(stages + kMaxSharedBytes - kBytesOfRing);
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
                const Item item(p, number, p.num_q_tiles);
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) {
                    const List list = list_of_query_tile(p, item, item.first_tile + i);
                    walk.set(i, list.entries, list.length, p.num_kv_tiles);
                }
            };
            const auto copy = [&](int number, int kv_tile, int stage) {
                if (threadIdx.x % kWarp != 0) return;
                const Item item(p, number, p.num_q_tiles);
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
        Consumer<kStagesOfQueries<D>> consumer(ring, warpgroup - 1);
        for (int number = blockIdx.x; number < items; number += gridDim.x) {
            const Item item(p, number, p.num_q_tiles);
            const int q_tile = item.first_tile + warpgroup - 1;
            if (q_tile >= p.num_q_tiles) continue;
            const Tile tile = tile_at(p.q_tiles, q_tile, p.num_q_tokens);
            uint32_t q[D / 16][4], grad[D / 16][4];
            load_operand<T, D>(q, p.q, item.batch, item.head, tile);
            load_operand<T, D>(grad, p.grad, item.batch, item.head, tile);
            float lse[2] = {}, delta[2] = {};  // lse to base 2
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row() + 8 * half;
                if (row >= tile.tokens) continue;
                const int64_t place = item.plane(p) * p.num_q_tokens + tile.first + row;
                lse[half] = p.lse[place] * kLog2OfE;
                delta[half] = p.delta[place];
            }
            float dq[D / 2] = {};
            const int count = list_of_query_tile(p, item, q_tile).length;
            consumer.take(count, [&](int stage, int tokens) {
                const uint32_t k_tile = first_stage + stage * 2 * kTileBytes<D>;
                with_steps_of(tokens, [&](auto steps) {
                    add_queries<T, D, decltype(steps)::kSteps>(dq, q, grad, k_tile,
                                                               k_tile + kTileBytes<D>, tokens, lse,
                                                               delta, kScale<D> * kLog2OfE);
                });
            });
            store_rows<T, D>(p.dq, item.batch, item.head, tile, dq, kScale<D>);
            clear_padding(p.q_tiles, q_tile, p.num_q_tiles, p.num_q_tokens,
                          [&](int token) { clear_row<T, D>(p.dq, item.batch, item.head, token); });
        }
        consumer.finish();
    }
}

// ---- gradients of keys and values --------------------------------------------------------------

// A stage: a tile of q, one of grad, their log-sum-exps and deltas. In front of the stages are the
// key and value tiles of the consumers, which have no registers left for them.
constexpr int kStatisticsBytes = 2 * kTileRows * sizeof(float);
template <int D>
constexpr uint32_t kResidentBytes = kConsumers * 2 * kTileBytes<D>;
template <int D>
constexpr uint32_t kStageBytes = 2 * kTileBytes<D> + kStatisticsBytes;
template <int D>
constexpr int kStagesOfKeys = (kMaxSharedBytes - kBytesOfRing - kResidentBytes<D>) / kStageBytes<D>;

__device__ __forceinline__ List list_of_key_tile(const FineBackward& p, const Item& item,
                                                 int tile) {
    const int64_t plane = item.plane(p);
    const int length = p.num_q_tiles * p.k;
    const int32_t* rows = p.rows + plane * length;
    if (tile >= p.num_kv_tiles) return {rows, 0};
    const int32_t* offsets = p.offsets + plane * (p.num_kv_tiles + 1) + tile;
    const int begin = min(max(offsets[0], 0), length);
    return {rows + begin, min(max(offsets[1], begin), length) - begin};
}

// dv += P^T dO and dk += dS^T Q of the query tile of a stage, without the scale. Nothing needs a
// mask: past the tile's tokens q, grad, lse and delta are 0, so P is 1 and meets zeros, dS is 0.
template <class T, int D, int kSteps>
__device__ __forceinline__ void add_keys(float (&dk)[D / 2], float (&dv)[D / 2], uint32_t k_tile,
                                         uint32_t v_tile, uint32_t q_tile, uint32_t grad_tile,
                                         const float* statistics, float scale_log2) {
    float s[8 * kSteps], dp[8 * kSteps];
    uint32_t weights[kSteps][4], ds[kSteps][4];
    cuda::wgmma_fence();
    start_over_channels<T, D, kSteps>(s, k_tile, q_tile);
    start_over_channels<T, D, kSteps>(dp, v_tile, grad_tile);
    cuda::wgmma_wait<1>();
    cuda::pin(s);
#pragma unroll
    for (int i = 0; i < 8 * kSteps; i += 4) {
        const auto lse = cuda::load<float2>(statistics + 2 * i + first_column());
        s[i] = cuda::exp2_approx(s[i] * scale_log2 - lse.x * kLog2OfE);
        s[i + 1] = cuda::exp2_approx(s[i + 1] * scale_log2 - lse.y * kLog2OfE);
        s[i + 2] = cuda::exp2_approx(s[i + 2] * scale_log2 - lse.x * kLog2OfE);
        s[i + 3] = cuda::exp2_approx(s[i + 3] * scale_log2 - lse.y * kLog2OfE);
    }
    pack_operand<T>(weights, s);
    start_over_rows<T, D, kSteps>(dv, weights, grad_tile);
    cuda::wgmma_wait<1>();
    cuda::pin(dp);
#pragma unroll
    for (int i = 0; i < 8 * kSteps; i += 4) {
        const auto delta = cuda::load<float2>(statistics + kTileRows + 2 * i + first_column());
        s[i] *= dp[i] - delta.x;
        s[i + 1] *= dp[i + 1] - delta.y;
        s[i + 2] *= dp[i + 2] - delta.x;
        s[i + 3] *= dp[i + 3] - delta.y;
    }
    pack_operand<T>(ds, s);
    start_over_rows<T, D, kSteps>(dk, ds, q_tile);
    cuda::wgmma_wait<0>();
    cuda::pin(dv);
    cuda::pin(dk);
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    backward_keys_kernel(const __grid_constant__ TileMaps q_maps,
                         const __grid_constant__ TileMaps grad_maps,
                         const __grid_constant__ TileMaps k_maps,
                         const __grid_constant__ TileMaps v_maps,
                         const __grid_constant__ FineBackward p) {
    unsigned char* shared = cuda::dynamic_shared();
    unsigned char* stages = shared + kResidentBytes<D>;
    auto* statistics = reinterpret_cast<float*>(stages + kStagesOfKeys<D> * 2 * kTileBytes<D>);
    auto& ring =
        *reinterpret_cast<Ring<kStagesOfKeys<D>>*>(shared + kMaxSharedBytes - kBytesOfRing);
    auto* resident = reinterpret_cast<Mbarrier*>(&ring + 1);
    ring.init(1 + kWarp, kConsumers);
    if (threadIdx.x < kConsumers) cuda::init(resident[threadIdx.x], 1);
    cuda::fence_mbarrier_init();
    __syncthreads();

    const int warpgroup = __shfl_sync(cuda::kAllLanes, threadIdx.x / kWarpgroup, 0);
    const uint32_t first_stage = cuda::shared_address(stages);
    const Item item(p, blockIdx.x, p.num_kv_tiles);
    if (warpgroup == 0) {
        cuda::keep_registers<kProducerRegisters>();
        const int warp = __shfl_sync(cuda::kAllLanes, threadIdx.x / kWarp, 0);
        if (warp == 0) {
            const auto begin = [&](int, Union<kConsumers>& walk) {
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) {
                    const List list = list_of_key_tile(p, item, item.first_tile + i);
                    walk.set(i, list.entries, list.length, p.num_q_tiles);
                }
            };
            const auto copy = [&](int, int q_tile, int stage) {
                const Tile tile = tile_at(p.q_tiles, q_tile, p.num_q_tokens);
                const int lane = threadIdx.x % kWarp;
                Mbarrier& landed = ring.landed[stage];
                const uint32_t to = cuda::shared_address(statistics + stage * 2 * kTileRows);
                const int64_t first = item.plane(p) * p.num_q_tokens + tile.first;
#pragma unroll
                for (int row = lane; row < kTileRows; row += kWarp) {
                    const bool valid = row < tile.tokens;
                    const int64_t from = valid ? first + row : 0;
                    cuda::copy_async_4(to + row * 4, p.lse + from, valid);
                    cuda::copy_async_4(to + (kTileRows + row) * 4, p.delta + from, valid);
                }
                cuda::arrive_after_copies(landed);
                if (lane != 0) return;
                ring.tokens[stage] = tile.tokens;
                cuda::arrive_expecting(landed, 2 * bytes_of<D>(tile.tokens));
                const uint32_t q = first_stage + stage * 2 * kTileBytes<D>;
                copy_tile<D>(q, q_maps, tile, item.head, item.batch, landed);
                copy_tile<D>(q + kTileBytes<D>, grad_maps, tile, item.head, item.batch, landed);
            };
            // A block for each item: the lengths of their lists differ much.
            produce<kConsumers>(ring, gridDim.x, begin, copy);
            // No thread leaves while its copies are under way.
            cuda::copy_async_commit();
            cuda::copy_async_wait<0>();
        } else if (warp == 1) {
            zero_ends<D>(ring, stages);
        }
    } else {
        cuda::take_registers<kConsumerRegisters>();
        const int number = warpgroup - 1;
        const int kv_tile = item.first_tile + number;
        Consumer<kStagesOfKeys<D>> consumer(ring, number);
        if (kv_tile < p.num_kv_tiles) {
            const Tile tile = tile_at(p.kv_tiles, kv_tile, p.num_kv_tokens);
            const uint32_t k_tile = cuda::shared_address(shared) + number * 2 * kTileBytes<D>;
            const uint32_t v_tile = k_tile + kTileBytes<D>;
            if (threadIdx.x % kWarpgroup == 0) {
                cuda::arrive_expecting(resident[number], 2 * bytes_of<D>(tile.tokens));
                copy_tile<D>(k_tile, k_maps, tile, item.head, item.batch, resident[number]);
                copy_tile<D>(v_tile, v_maps, tile, item.head, item.batch, resident[number]);
            }
            cuda::wait(resident[number], 0);
            float dk[D / 2] = {}, dv[D / 2] = {};
            const int count = list_of_key_tile(p, item, kv_tile).length;
            consumer.take(count, [&](int stage, int tokens) {
                const uint32_t q_tile = first_stage + stage * 2 * kTileBytes<D>;
                with_steps_of(tokens, [&](auto steps) {
                    add_keys<T, D, decltype(steps)::kSteps>(
                        dk, dv, k_tile, v_tile, q_tile, q_tile + kTileBytes<D>,
                        statistics + stage * 2 * kTileRows, kScale<D> * kLog2OfE);
                });
            });
            store_rows<T, D>(p.dk, item.batch, item.head, tile, dk, kScale<D>);
            store_rows<T, D>(p.dv, item.batch, item.head, tile, dv, 1.0f);
            clear_padding(p.kv_tiles, kv_tile, p.num_kv_tiles, p.num_kv_tokens, [&](int token) {
                clear_row<T, D>(p.dk, item.batch, item.head, token);
                clear_row<T, D>(p.dv, item.batch, item.head, token);
            });
        }
        consumer.finish();
    }
}

// ---- launching ---------------------------------------------------------------------------------

int items_of(const Problem& p, int tiles) {
    return p.batch * p.heads * ((tiles + kConsumers - 1) / kConsumers);
}

template <class T, int D>
void launch_backward(const FineBackward& p, cuda::Stream stream) {
    const TileMaps k_maps = map_tiles("k", p.k_rows, p, p.num_kv_tokens);
    const TileMaps v_maps = map_tiles("v", p.v, p, p.num_kv_tokens);
    const int items = items_of(p, p.num_q_tiles);
    cuda::launch(backward_queries_kernel<T, D>, dim3(std::min(items, cuda::num_multiprocessors())),
                 dim3(kThreads), kMaxSharedBytes, stream, k_maps, v_maps, p, items);
    cuda::launch(backward_keys_kernel<T, D>, dim3(items_of(p, p.num_kv_tiles)), dim3(kThreads),
                 kMaxSharedBytes, stream, map_tiles("q", p.q, p, p.num_q_tokens),
                 map_tiles("grad", p.grad, p, p.num_q_tokens), k_maps, v_maps, p);
}

}  // namespace
}  // namespace sm90

void backward_sm90(const FineBackward& p, cuda::Stream stream) {
    backward_delta(p, stream);
    if (p.is_bf16)
        p.head_dim == 64 ? sm90::launch_backward<cuda::BFloat16, 64>(p, stream)
                         : sm90::launch_backward<cuda::BFloat16, 128>(p, stream);
    else
        p.head_dim == 64 ? sm90::launch_backward<cuda::Float16, 64>(p, stream)
                         : sm90::launch_backward<cuda::Float16, 128>(p, stream);
}

}  // namespace fastvideo::vsa
