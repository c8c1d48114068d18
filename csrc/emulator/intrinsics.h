// SPDX-License-Identifier: Apache-2.0
// What nvcc knows by itself, for g++: CUDA's keywords, vector types and intrinsic functions.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "emulator/engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __brev(unsigned bits) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- barriers ----------------------------------------------------------------------------------

inline void __syncthreads() {
    fastvideo::emulator::barrier(0, blockDim.x * blockDim.y * blockDim.z, true);
}
inline void __syncwarp(unsigned mask = ~0u) {
    int nothing = 0;
    fastvideo::emulator::warp_collective("__syncwarp", mask, nothing, [](int* const*) {});
}
inline int __syncthreads_count(int predicate) {
    fastvideo::emulator::block_collective(
        "__syncthreads_count", predicate, [](int* const* threads) {
            const unsigned size = blockDim.x * blockDim.y * blockDim.z;
            int count = 0;
            for (unsigned i = 0; i < size; ++i) count += *threads[i] != 0;
            for (unsigned i = 0; i < size; ++i) *threads[i] = count;
        });
    return predicate;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

// ---- between the lanes of a warp ---------------------------------------------------------------

namespace fastvideo::emulator {

template <class T>
struct Shuffled {
    T given, taken;
    int source;  // lane; its own where there is none
};

// `source` is a lane of the warp; where the hardware would leave the value undefined it is an
// error.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
    Shuffled<T> mine{value, {}, source};
    warp_collective(name, mask, mine, [](Shuffled<T>* const* lanes) {
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            if (!lanes[lane]) continue;
            const Shuffled<T>* from = lanes[lanes[lane]->source];
            if (!from) fail("a shuffle reads a lane that is not in the mask");
            lanes[lane]->taken = from->given;
        }
    });
    return mine.taken;
}

inline int lane() { return static_cast<int>(thread() % kWarp); }
// A lane in the same segment of `width` lanes, or its own.
inline int within(int source, int width) {
    return source >= 0 && source / width == lane() / width ? source : lane();
}

inline unsigned ballot(const char* name, unsigned mask, int predicate) {
    struct Vote {
        bool yes;
        unsigned all;
    } mine{predicate != 0, 0};
    warp_collective(name, mask, mine, [](Vote* const* lanes) {
        unsigned all = 0;
        for (unsigned lane = 0; lane < kWarp; ++lane)
            if (lanes[lane] && lanes[lane]->yes) all |= 1u << lane;
        for (unsigned lane = 0; lane < kWarp; ++lane)
            if (lanes[lane]) lanes[lane]->all = all;
    });
    return mine.all;
}

// Fibers are never interrupted, so a plain read and write is atomic.
template <class T, class Function>
T exchange(T* address, Function function) {
    const T before = *address;
    *address = function(before);
    return before;
}

}  // namespace fastvideo::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    using namespace fastvideo::emulator;
    return shuffle("__shfl_sync", mask, value, lane() / width * width + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
    using namespace fastvideo::emulator;
    return shuffle("__shfl_xor_sync", mask, value, within(lane() ^ flip, width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    using namespace fastvideo::emulator;
    return shuffle("__shfl_down_sync", mask, value,
                   within(lane() + static_cast<int>(delta), width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    using namespace fastvideo::emulator;
    return shuffle("__shfl_up_sync", mask, value, within(lane() - static_cast<int>(delta), width));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return fastvideo::emulator::ballot("__ballot_sync", mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
    return fastvideo::emulator::ballot("__any_sync", mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return fastvideo::emulator::ballot("__all_sync", mask, !predicate) == 0;
}

// ---- atomics -----------------------------------------------------------------------------------

template <class T>
T atomicAdd(T* address, T value) {
    static_assert(std::is_integral_v<T>, "sums of floating point must not depend on the order");
    return fastvideo::emulator::exchange(address, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* address, T value) {
    return fastvideo::emulator::exchange(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, T value) {
    return fastvideo::emulator::exchange(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, T value) {
    return fastvideo::emulator::exchange(address, [=](T old) { return old | value; });
}
