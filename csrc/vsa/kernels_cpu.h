// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of Video Sparse Attention offer, whichever instruction set they are built
// for: steps on one tile each, without threads, allocations or checks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "vsa/fine.h"

namespace fastvideo::vsa {

inline constexpr int kTileTokens = 64;
inline constexpr int kMostChannels = 256;

// The rows (S,D) of one batch and head; `token` is the stride in elements.
struct HeadRows {
    void* data = nullptr;
    int64_t token = 0;
};

// A tile of tokens and the end of the rows it owns, padding included.
struct OwnedTile : Tile {
    int32_t begin, end;
};

struct ForwardTile {
    int head_dim;
    HeadRows q, gate, out;  // of the head; gate.data null: 1
    const float* coarse;    // (D,) of this tile, or null
    float* lse;             // (S,) of the head
    OwnedTile tile;
    const int32_t* chosen;  // key tiles
    int num_chosen;
    const Tile* kv_tiles;
    const std::byte* packed;  // key tiles of the head, FineKernels::kv_bytes each
};

struct QueryTile {
    int head_dim;
    HeadRows grad, q, out, gate, dq, dgate;
    const float* coarse;
    float* dcoarse;  // (D,) of this tile, or null
    const float* lse;
    OwnedTile tile;
    std::byte* packed;  // FineKernels::query_bytes
};

struct KeyTile {
    int head_dim;
    HeadRows k, v, dk, dv;
    OwnedTile tile;
    std::byte* scratch;  // FineKernels::backward_bytes
};

// Fine attention for one dtype. Sizes are in bytes, for a number of channels.
struct FineKernels {
    size_t (*kv_bytes)(int head_dim);
    size_t (*forward_bytes)(int head_dim);
    size_t (*query_bytes)(int head_dim);
    size_t (*backward_bytes)(int head_dim);

    void (*pack_kv)(int head_dim, HeadRows k, HeadRows v, Tile tile, std::byte* packed);
    void (*forward)(const ForwardTile& work, std::byte* scratch);

    // Once for each query tile: packs it, zeroes its dq, writes the gradients of coarse and gate.
    void (*begin_query)(const QueryTile& query);
    // Once for each key tile, then for each query tile that chose it: `pair`, which adds to dk and
    // dv, and `add_dq`, which adds what the last `pair` found to the query tile's dq.
    void (*begin_key)(const KeyTile& key);
    void (*pair)(const KeyTile& key, const QueryTile& query);
    void (*add_dq)(const KeyTile& key, const QueryTile& query);
    void (*end_key)(const KeyTile& key);
    void (*end_query)(const QueryTile& query);
};

struct PoolKernels {
    void (*pool)(HeadRows x, Tile tile, int head_dim, float* mean);
    void (*pool_backward)(const float* grad, OwnedTile tile, int head_dim, HeadRows out);
};

enum class Dtype { float32, bfloat16, float16 };

struct Kernels {
    FineKernels fine[3];  // by Dtype
    PoolKernels pool[3];
};

}  // namespace fastvideo::vsa

FASTVIDEO_DECLARE_KERNELS(::fastvideo::vsa::Kernels, vsa_kernels)
