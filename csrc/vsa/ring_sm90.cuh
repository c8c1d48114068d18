// SPDX-License-Identifier: Apache-2.0
// How pairs of tiles reach the tensor cores of a Hopper GPU: one warp copies them into a ring of
// stages in shared memory, one puts their ends in order, and warpgroups take those they need.
//
// What bounds sparse attention is the way from L2 to shared memory: a pair of 64x128 tiles, 32 KiB,
// feeds 2.1 MFLOP of the forward pass, so 560 TFLOP/s take 8.7 TB/s if nobody shares. Therefore the
// consumers of a block, neighbours that choose much the same tiles, walk the union of their lists,
// and a stage that several of them own is loaded once. Three lists of random tenths have a union a
// tenth shorter than their sum; neighbours in a video share far more.
#pragma once

#include "cuda/hopper.h"
#include "cuda/wgmma.h"
#include "vsa/fine.h"

namespace fastvideo::vsa::sm90 {

using cuda::Mbarrier;

inline constexpr int kTileRows = 64;
inline constexpr int kNoTile = -1;
inline constexpr int kStep =
    16;  // rows of a tile that are copied and computed or left out together
inline constexpr int kWarp = 32;
inline constexpr int kWarpgroup = 128;
inline constexpr int kMaxSharedBytes = 232448;  // of a block
inline constexpr int kBytesOfRing = 512;        // at the end of them
inline constexpr uint32_t kBoxBytes = kTileRows * cuda::kBoxRowBytes;

template <int D>
inline constexpr uint32_t kTileBytes = D / cuda::kBoxColumns * kBoxBytes;

// Of one tensor: boxes of 64 channels and as many rows as a tile, or as a step.
struct TileMaps {
    CUtensorMap whole, step;
};

// A row of a tile table, whatever it holds: kernels cannot refuse one. No token for kNoTile.
__device__ __forceinline__ Tile tile_at(const Tile* tiles, int index, int num_tokens) {
    if (index == kNoTile) return {0, 0};
    const int2 given = cuda::load<int2>(tiles + index);
    const int tokens = min(max(given.y, 1), min(kTileRows, num_tokens));
    return {min(max(given.x, 0), num_tokens - tokens), tokens};
}

__device__ __forceinline__ int steps_of(int tokens) { return (tokens + kStep - 1) / kStep; }

// What copy_tile() copies.
template <int D>
__device__ __forceinline__ uint32_t bytes_of(int tokens) {
    return steps_of(tokens) * kStep * D * 2;
}

// By one thread: the steps that hold tokens of `tile`, with rows of others or zeros behind these.
template <int D>
__device__ __forceinline__ void copy_tile(uint32_t to, const TileMaps& maps, Tile tile, int head,
                                          int batch, Mbarrier& barrier) {
    const int steps = steps_of(tile.tokens);
#pragma unroll
    for (int channel = 0; channel < D; channel += cuda::kBoxColumns, to += kBoxBytes) {
        if (steps == kTileRows / kStep) {
            cuda::copy_box(to, maps.whole, channel, tile.first, head, batch, barrier);
            continue;
        }
        for (int step = 0; step < steps; ++step)
            cuda::copy_box(to + step * kStep * cuda::kBoxRowBytes, maps.step, channel,
                           tile.first + step * kStep, head, batch, barrier);
    }
}

// A stage goes round: the producer waits for `empty`, copies and announces, the copies land, the
// ends of the tiles are zeroed, it is `full`, each warp of each consumer leaves it.
template <int num_stages>
struct Ring {
    static constexpr int kStages = num_stages;

    Mbarrier landed[kStages], full[kStages], empty[kStages];
    int tokens[kStages];       // of both tiles
    uint32_t owners[kStages];  // bit c: consumer c; none: there are no more

    // By all threads of the block; `landings` arrive besides the bytes.
    __device__ void init(int landings, int consumers) {
        static_assert(sizeof(Ring) <= kBytesOfRing - 2 * sizeof(Mbarrier) * 2);
        for (int i = threadIdx.x; i < kStages; i += blockDim.x) {
            cuda::init(landed[i], landings);
            cuda::init(full[i], 1);
            cuda::init(empty[i], consumers * kWarpgroup / kWarp);
        }
    }
};

// A place in the ring; waiting for parity ^ 1 passes in the first round.
template <int kStages>
struct Cursor {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// Walks several lists of tiles at once, by a warp: at each step the lowest of their next tiles, for
// all lists where it is next. Ascending lists come out as their sorted union; any others, whole and
// each in its order.
template <int kLists>
class Union {
  public:
    __device__ __forceinline__ void set(int which, const int32_t* entries, int length,
                                        int num_tiles) {
        entries_[which] = entries;
        length_[which] = length;
        position_[which] = 0;
        last_ = num_tiles - 1;
        fetch(which);
    }

    // False at the end.
    __device__ __forceinline__ bool next(int& tile, uint32_t& owners) {
        int head[kLists];
        tile = kNoMore;
#pragma unroll
        for (int i = 0; i < kLists; ++i) {
            head[i] = __shfl_sync(cuda::kAllLanes, fetched_[i], position_[i] % kWarp);
            tile = min(tile, head[i]);
        }
        owners = 0;
        if (tile == kNoMore) return false;
#pragma unroll
        for (int i = 0; i < kLists; ++i) {
            if (head[i] != tile) continue;
            owners |= 1u << i;
            if (++position_[i] % kWarp == 0) fetch(i);
        }
        return true;
    }

  private:
    static constexpr int kNoMore = 0x7fffffff;

    __device__ __forceinline__ void fetch(int which) {
        const int i = position_[which] + static_cast<int>(threadIdx.x % kWarp);
        fetched_[which] = i < length_[which] ? min(max(entries_[which][i], 0), last_) : kNoMore;
    }

    const int32_t* entries_[kLists];
    int length_[kLists], position_[kLists], fetched_[kLists], last_;
};

// A warp's work. `begin(item, walk)` sets the lists of one of this block's items; `copy(item, tile,
// stage)` writes its number of tokens and starts copies that end in arrivals at `landed`. At the
// end comes kNoTile, which has no token.
template <int kLists, int kStages, class Begin, class Copy>
__device__ __forceinline__ void produce(Ring<kStages>& ring, int items, Begin begin, Copy copy) {
    Cursor<kStages> at;
    const auto put = [&](int item, int tile, uint32_t owners) {
        cuda::wait(ring.empty[at.stage], at.parity ^ 1);
        if (threadIdx.x % kWarp == 0) ring.owners[at.stage] = owners;
        copy(item, tile, at.stage);
        at.advance();
    };
    Union<kLists> walk;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        begin(item, walk);
        int tile;
        for (uint32_t owners; walk.next(tile, owners);) put(item, tile, owners);
    }
    put(0, kNoTile, 0);
}

// Another warp's work: zeroes the rows past a tile's tokens up to the end of a step. They hold
// other tiles or padding, which may be infinite or NaN, and a weight of 0 does not keep these out
// of a product.
template <int D, int kStages>
__device__ __forceinline__ void zero_ends(Ring<kStages>& ring, unsigned char* stages) {
    constexpr int kBoxes = 2 * D / cuda::kBoxColumns;  // of both tiles
    constexpr int kVectors = kBoxes * cuda::kBoxRowBytes / sizeof(uint4);
    const int lane = threadIdx.x % kWarp;
    for (Cursor<kStages> at;; at.advance()) {
        cuda::wait(ring.landed[at.stage], at.parity);
        const int tokens = ring.tokens[at.stage];
        const int vectors = (steps_of(tokens) * kStep - tokens) * kVectors;
        for (int i = lane; i < vectors; i += kWarp) {
            const int row = tokens + i / kVectors, vector = i % kVectors;
            unsigned char* box = stages + (at.stage * kBoxes + vector / 8) * kBoxBytes;
            cuda::store(box + row * cuda::kBoxRowBytes + vector % 8 * sizeof(uint4),
                        uint4{0, 0, 0, 0});
        }
        if (vectors > 0) cuda::fence_proxy_async();
        __syncwarp();  // also, no lane may fall behind by a round: it would wait for ever
        if (lane == 0) cuda::arrive(ring.full[at.stage]);
        if (tokens == 0) return;
    }
}

// A warpgroup's view of the ring.
template <int kStages>
class Consumer {
  public:
    __device__ __forceinline__ Consumer(Ring<kStages>& ring, int number)
        : ring_(ring), number_(number) {}

    // Calls `use(stage, tokens)` for the next `count` stages it owns.
    template <class Use>
    __device__ __forceinline__ void take(int count, Use use) {
        while (count > 0) {
            cuda::wait(ring_.full[at_.stage], at_.parity);
            // The same for all lanes, which the compiler is to know.
            const uint32_t owners = __shfl_sync(cuda::kAllLanes, ring_.owners[at_.stage], 0);
            if (owners >> number_ & 1) {
                use(at_.stage, __shfl_sync(cuda::kAllLanes, ring_.tokens[at_.stage], 0));
                --count;
            }
            leave();
        }
    }

    // Lets the others' stages pass by; a wait on an mbarrier may skip no phase.
    __device__ __forceinline__ void finish() {
        for (;; leave()) {
            cuda::wait(ring_.full[at_.stage], at_.parity);
            if (__shfl_sync(cuda::kAllLanes, ring_.owners[at_.stage], 0) == 0) return;
        }
    }

  private:
    __device__ __forceinline__ void leave() {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) cuda::arrive(ring_.empty[at_.stage]);
        at_.advance();
    }

    Ring<kStages>& ring_;
    int number_;
    Cursor<kStages> at_;
};

template <int count>
struct Steps {
    static constexpr int kSteps = count;
};

// Calls `use` with the number of steps that hold tokens as a type.
template <class Use>
__device__ __forceinline__ void with_steps_of(int tokens, Use use) {
    switch (steps_of(tokens)) {
        case 1:
            return use(Steps<1>{});
        case 2:
            return use(Steps<2>{});
        case 3:
            return use(Steps<3>{});
        default:
            return use(Steps<4>{});
    }
}

}  // namespace fastvideo::vsa::sm90
