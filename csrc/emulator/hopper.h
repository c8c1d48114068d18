// SPDX-License-Identifier: Apache-2.0
// What Hopper's instructions do, as cuda/hopper.h and cuda/wgmma.h use them, on the emulator.
//
// Bulk copies land, and products of warpgroups take place, at any moment up to the last at which
// somebody waits for them. Until then accumulators are NaN. The async proxy has a view of shared
// memory of its own, which ordinary stores reach at the next fence_proxy_async().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

// Of a 4-dimensional tensor of 16-bit numbers, innermost first; sizes in elements, strides in
// bytes.
struct alignas(64) CUtensorMap {
    const unsigned char* base;
    uint64_t sizes[4], strides[4];
    uint32_t box[4];
};

namespace fastvideo::emulator {

void mbarrier_init(uint64_t& state, uint32_t count);
inline void fence_mbarrier_init() {}  // what is stored by init is seen by all at once
void mbarrier_arrive(uint64_t& state, uint32_t expected_bytes);
void mbarrier_wait(uint64_t& state, uint32_t parity);

void fence_proxy_async();

void encode_tensor_map(CUtensorMap& map, const void* base, const uint64_t (&sizes)[4],
                       const uint64_t (&strides)[3], const uint32_t (&box)[4]);
void copy_box(uint32_t to, const CUtensorMap& map, std::array<int, 4> first, uint64_t& barrier);
void arrive_after_copies(uint64_t& barrier);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t pending);

// One thread's part of a product: 64 x columns x 16.
struct Wgmma {
    float* accumulators;
    unsigned columns;
    const uint32_t* a_registers;  // or null: `a` says where A is
    uint64_t a, b;
    bool b_is_transposed, accumulate, is_bf16;
};
void wgmma(const Wgmma& mine);

inline void wgmma(float* d, unsigned columns, const uint32_t (&a)[4], uint64_t b,
                  bool b_is_transposed, bool accumulate, bool is_bf16) {
    wgmma({d, columns, a, 0, b, b_is_transposed, accumulate, is_bf16});
}
inline void wgmma(float* d, unsigned columns, uint64_t a, uint64_t b, bool b_is_transposed,
                  bool accumulate, bool is_bf16) {
    wgmma({d, columns, nullptr, a, b, b_is_transposed, accumulate, is_bf16});
}

}  // namespace fastvideo::emulator
