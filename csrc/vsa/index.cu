// SPDX-License-Identifier: Apache-2.0
// Which key tiles each query tile attends to: chosen by score or given as a map, and inverted.
//
// All of it is integers, ordered by tile, so that nothing depends on the order of execution.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "vsa/checks.h"

namespace fastvideo::vsa {

namespace {

using namespace fastvideo::cuda;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int64_t warp_of_grid() {
    return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
}
// How many of the lanes below this one are in `lanes`.
__device__ __forceinline__ int rank_in(unsigned lanes) {
    return __popc(lanes & ((1u << lane_index()) - 1));
}

// ---- top k -------------------------------------------------------------------------------------

// A number that sorts as the score does: NaN lowest, both zeros alike.
__device__ __forceinline__ uint32_t sortable(float score) {
    if (score != score) return 0;
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A warp for each row, which keeps kSteps * 32 scores in registers, or reads them again for kSteps
// of 0. Finds the highest bound that at least k scores reach, bit by bit.
template <int kSteps>
__global__ void __launch_bounds__(kThreads)
    topk_kernel(const float* scores, int64_t num_rows, int num_tiles, int k, int32_t* index) {
    const int64_t row = warp_of_grid();
    if (row >= num_rows) return;
    scores += row * num_tiles;
    index += row * k;
    auto read = [&](int step) {  // the lowest number beyond the end, where it loses all ties
        const int tile = step * 32 + lane_index();
        return tile < num_tiles ? sortable(scores[tile]) : 0;
    };
    uint32_t kept[kSteps ? kSteps : 1];
    if constexpr (kSteps > 0) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) kept[step] = read(step);
    }
    auto for_each = [&](auto body) {
        if constexpr (kSteps > 0) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) body(step, kept[step]);
        } else {
            for (int step = 0; step * 32 < num_tiles; ++step) body(step, read(step));
        }
    };

    uint32_t bound = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        const uint32_t higher = bound | bit;
        int reach = 0;
        for_each([&](int, uint32_t key) { reach += key >= higher; });
        reach = __reduce_add_sync(kAllLanes, reach);
        if (reach < k) continue;
        bound = higher;
        if (reach == k) break;
    }

    int above = 0;
    for_each([&](int, uint32_t key) { above += key > bound; });
    int ties = k - __reduce_add_sync(kAllLanes, above);  // to be taken yet
    for_each([&](int step, uint32_t key) {
        const unsigned tied = __ballot_sync(kAllLanes, key == bound);
        const bool take = key > bound || (key == bound && rank_in(tied) < ties);
        ties -= min(ties, __popc(tied));
        const unsigned taken = __ballot_sync(kAllLanes, take);
        if (take) index[rank_in(taken)] = step * 32 + lane_index();
        index += __popc(taken);
    });
}

// ---- maps --------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    map_kernel(const bool* map, int64_t num_rows, int num_tiles, int32_t* index, int32_t* counts) {
    const int64_t row = warp_of_grid();
    if (row >= num_rows) return;
    map += row * num_tiles;
    index += row * num_tiles;
    int count = 0;
#pragma unroll 4
    for (int first = 0; first < num_tiles; first += 32) {
        const int tile = first + lane_index();
        const bool take = tile < num_tiles && map[tile];
        const unsigned taken = __ballot_sync(kAllLanes, take);
        if (take) index[count + rank_in(taken)] = tile;
        count += __popc(taken);
    }
    for (int i = count + lane_index(); i < num_tiles; i += 32) index[i] = 0;
    if (lane_index() == 0) counts[row] = count;
}

// ---- inversion ---------------------------------------------------------------------------------
// By way of a map with one bit for each pair of tiles: (B*H, ceil(Q / 32), K) words, in which bit i
// of word w is query tile 32 w + i.

struct Inversion {
    const int32_t* index;
    const int32_t* counts;  // or null: all k
    int num_q_tiles, k, num_kv_tiles;
    int64_t num_heads;
    uint32_t* map;
    int32_t* offsets;
    int32_t* rows;

    constexpr int words() const { return (num_q_tiles + 31) / 32; }
};

constexpr int kRange = 8192;  // key tiles whose bits a block collects in shared memory

// A block for each word of query tiles and range of key tiles.
__global__ void __launch_bounds__(kThreads) mark_kernel(const __grid_constant__ Inversion p) {
    auto* const bits = reinterpret_cast<uint32_t*>(dynamic_shared());
    const int word = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.words()));
    const int64_t head = blockIdx.x / static_cast<unsigned>(p.words());
    const int first = static_cast<int>(blockIdx.y) * kRange;
    const int size = min(kRange, p.num_kv_tiles - first);
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) bits[i] = 0;
    __syncthreads();
    for (int bit = static_cast<int>(threadIdx.x / 32); bit < 32; bit += kWarps) {
        const int q_tile = word * 32 + bit;
        if (q_tile >= p.num_q_tiles) break;
        const int64_t row = head * p.num_q_tiles + q_tile;
        const int count = p.counts ? min(p.counts[row], p.k) : p.k;
        for (int i = lane_index(); i < count; i += 32) {
            const int kv_tile = p.index[row * p.k + i];
            if (kv_tile >= first && kv_tile < first + size)
                atomicOr(&bits[kv_tile - first], 1u << bit);
        }
    }
    __syncthreads();
    uint32_t* const to = p.map + (head * p.words() + word) * p.num_kv_tiles + first;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) to[i] = bits[i];
}

constexpr int kScanThreads = 1024;

// A block for each head: how many query tiles chose each key tile, and the sums of that.
__global__ void __launch_bounds__(kScanThreads)
    offsets_kernel(const __grid_constant__ Inversion p) {
    auto* const sums = reinterpret_cast<int*>(dynamic_shared());  // of each warp
    const int64_t head = blockIdx.x;
    const uint32_t* const map = p.map + head * p.words() * p.num_kv_tiles;
    int32_t* const offsets = p.offsets + head * (p.num_kv_tiles + 1);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = lane_index();
    int before = 0;
    for (int first = 0; first < p.num_kv_tiles; first += kScanThreads) {
        const int kv_tile = first + static_cast<int>(threadIdx.x);
        int count = 0;
        if (kv_tile < p.num_kv_tiles) {
#pragma unroll 8
            for (int word = 0; word < p.words(); ++word)
                count += __popc(map[static_cast<int64_t>(word) * p.num_kv_tiles + kv_tile]);
        }
        int sum = count;  // of this lane and those below
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(distance));
            if (lane >= distance) sum += other;
        }
        if (lane == 31) sums[warp] = sum;
        __syncthreads();
        const int of_warp = sums[lane];
        const int of_warps_below = __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
        const int of_all = __reduce_add_sync(kAllLanes, of_warp);
        if (kv_tile < p.num_kv_tiles) offsets[kv_tile] = before + of_warps_below + sum - count;
        before += of_all;
        __syncthreads();
    }
    if (threadIdx.x == 0) offsets[p.num_kv_tiles] = before;
}

// A warp for each key tile writes its list. Neighbours read the same sectors of the map at the same
// time. What is left at the end of the head's rows is set to 0.
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Inversion p) {
    const int blocks = (p.num_kv_tiles + kWarps - 1) / kWarps;
    const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(blocks));
    const int64_t head = blockIdx.x / static_cast<unsigned>(blocks);
    const int kv_tile = block * kWarps + static_cast<int>(threadIdx.x / 32);
    const int num_rows = p.num_q_tiles * p.k;
    const int32_t* const offsets = p.offsets + head * (p.num_kv_tiles + 1);
    int32_t* const rows = p.rows + head * num_rows;
    if (kv_tile < p.num_kv_tiles) {
        const uint32_t* const map = p.map + head * p.words() * p.num_kv_tiles + kv_tile;
        int to = offsets[kv_tile];
        for (int first = 0; first < p.words(); first += 32) {
            const int word = first + lane_index();
            const uint32_t mine =
                word < p.words() ? map[static_cast<int64_t>(word) * p.num_kv_tiles] : 0;
            for (int i = 0; i < min(32, p.words() - first); ++i) {
                const uint32_t bits = __shfl_sync(kAllLanes, mine, i);
                if (bits >> lane_index() & 1)
                    rows[to + rank_in(bits)] = (first + i) * 32 + lane_index();
                to += __popc(bits);
            }
        }
    }
    for (int i = offsets[p.num_kv_tiles] + block * kThreads + static_cast<int>(threadIdx.x);
         i < num_rows; i += blocks * kThreads)
        rows[i] = 0;
}

// ---- operators ---------------------------------------------------------------------------------

dim3 grid_of(int64_t blocks, int64_t ranges = 1) {
    STD_TORCH_CHECK(blocks <= INT32_MAX && ranges <= 65535, "vsa: a grid of ", blocks, " x ",
                    ranges, " blocks, expected at most ", INT32_MAX, " x 65535");
    return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ranges));
}

int64_t blocks_for(int64_t warps) { return (warps + kWarps - 1) / kWarps; }

Tensor vsa_topk(Tensor scores, int64_t k) {
    check_topk(scores, k);
    const OnDeviceOf device(scores);
    scores = torch::stable::contiguous(scores);
    const int64_t num_rows = scores.size(0) * scores.size(1) * scores.size(2);
    const int num_tiles = static_cast<int>(scores.size(3));
    Tensor index = torch::stable::new_empty(
        scores, {scores.size(0), scores.size(1), scores.size(2), k}, ScalarType::Int);
    const auto kernel = num_tiles <= 8 * 32    ? topk_kernel<8>
                        : num_tiles <= 16 * 32 ? topk_kernel<16>
                        : num_tiles <= 32 * 32 ? topk_kernel<32>
                        : num_tiles <= 64 * 32 ? topk_kernel<64>
                                               : topk_kernel<0>;
    launch(kernel, grid_of(blocks_for(num_rows)), dim3(kThreads), 0, device.stream(),
           scores.const_data_ptr<float>(), num_rows, num_tiles, static_cast<int>(k),
           index.mutable_data_ptr<int32_t>());
    return index;
}

std::tuple<Tensor, Tensor> vsa_map_to_index(Tensor block_map) {
    check_map(block_map);
    const OnDeviceOf device(block_map);
    block_map = torch::stable::contiguous(block_map);
    const int64_t batch = block_map.size(0), heads = block_map.size(1), rows = block_map.size(2);
    Tensor index = torch::stable::new_empty(block_map, block_map.sizes(), ScalarType::Int);
    Tensor counts = torch::stable::new_empty(block_map, {batch, heads, rows}, ScalarType::Int);
    launch(map_kernel, grid_of(blocks_for(counts.numel())), dim3(kThreads), 0, device.stream(),
           block_map.const_data_ptr<bool>(), counts.numel(), static_cast<int>(block_map.size(3)),
           index.mutable_data_ptr<int32_t>(), counts.mutable_data_ptr<int32_t>());
    return {index, counts};
}

std::tuple<Tensor, Tensor> vsa_invert(Tensor index, OptionalTensor counts, int64_t num_kv_tiles) {
    check_invert(index, counts, num_kv_tiles);
    const OnDeviceOf device(index);
    const Stream stream = device.stream();
    index = torch::stable::contiguous(index);
    if (counts) counts = torch::stable::contiguous(*counts);
    const int64_t batch = index.size(0), heads = index.size(1);
    Inversion p{};
    p.num_q_tiles = static_cast<int>(index.size(2));
    p.k = static_cast<int>(index.size(3));
    p.num_kv_tiles = static_cast<int>(num_kv_tiles);
    p.num_heads = batch * heads;
    Tensor offsets =
        torch::stable::new_empty(index, {batch, heads, num_kv_tiles + 1}, ScalarType::Int);
    Tensor rows = torch::stable::new_empty(index, {batch, heads, index.size(2) * index.size(3)},
                                           ScalarType::Int);
    Tensor map =
        torch::stable::new_empty(index, {p.num_heads, p.words(), num_kv_tiles}, ScalarType::Int);
    p.index = index.const_data_ptr<int32_t>();
    p.counts = counts ? counts->const_data_ptr<int32_t>() : nullptr;
    p.map = reinterpret_cast<uint32_t*>(map.mutable_data_ptr<int32_t>());
    p.offsets = offsets.mutable_data_ptr<int32_t>();
    p.rows = rows.mutable_data_ptr<int32_t>();
    const int64_t ranges = (num_kv_tiles + kRange - 1) / kRange;
    const size_t range_bytes = std::min<int64_t>(num_kv_tiles, kRange) * sizeof(uint32_t);
    launch(mark_kernel, grid_of(p.num_heads * p.words(), ranges), dim3(kThreads), range_bytes,
           stream, p);
    launch(offsets_kernel, grid_of(p.num_heads), dim3(kScanThreads),
           kScanThreads / 32 * sizeof(int), stream, p);
    launch(rows_kernel, grid_of(p.num_heads * blocks_for(num_kv_tiles)), dim3(kThreads), 0, stream,
           p);
    return {offsets, rows};
}

}  // namespace

FASTVIDEO_CUDA_IMPL(m) {
    m.impl("vsa_topk", TORCH_BOX(&vsa_topk));
    m.impl("vsa_map_to_index", TORCH_BOX(&vsa_map_to_index));
    m.impl("vsa_invert", TORCH_BOX(&vsa_invert));
}

}  // namespace fastvideo::vsa
