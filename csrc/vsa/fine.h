// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the fine attention are given, whichever instructions they use.
#pragma once

#include <cstdint>

namespace fastvideo::vsa {

// A (B,H,S,D) tensor of 16-bit numbers with dense rows; strides in elements.
struct Rows {
    void* data = nullptr;
    int64_t batch = 0, head = 0, token = 0;
};

// First token and number of tokens of a tile.
struct Tile {
    int32_t first, tokens;
};

struct Problem {
    int batch, heads, head_dim;
    int num_q_tokens, num_kv_tokens;
    int num_q_tiles, num_kv_tiles;
    int k;                  // columns of index
    bool is_bf16;           // otherwise float16
    const Tile* q_tiles;    // (Q,)
    const Tile* kv_tiles;   // (K,)
    const int32_t* index;   // (B,H,Q,k)
    const int32_t* counts;  // (B,H,Q), or null: all k
};

struct FineForward : Problem {
    Rows q, k_rows, v;
    Rows gate;            // data null: 1
    const float* coarse;  // (B,H,Q,D), or null
    Rows out;
    float* lse;  // (B,H,S)
};

struct FineBackward : Problem {
    Rows grad, q, k_rows, v, out, gate;
    const float* coarse;
    const float* lse;
    const int32_t* offsets;  // (B,H,K+1) into rows
    const int32_t* rows;     // (B,H,Q*k): for each key tile the query tiles that chose it
    float* delta;            // (B,H,S): scratch
    Rows dq, dk, dv, dgate;
    float* dcoarse;  // (B,H,Q,D), or null
};

}  // namespace fastvideo::vsa
