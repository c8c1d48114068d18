// SPDX-License-Identifier: Apache-2.0
// Eight neighbouring channels of a tensor, which kernels limited by memory work on at a time: 16
// bytes of a 16-bit format, twice that of float32.
#pragma once

#include "cuda/device.h"

namespace fastvideo::cuda {

inline constexpr int kEight = 8;

struct Float8 {
    float at[kEight];
};

__device__ __forceinline__ Float8 filled(float value) {
    Float8 all;
#pragma unroll
    for (int e = 0; e < kEight; ++e) all.at[e] = value;
    return all;
}

template <class T>
__device__ __forceinline__ Float8 load_eight(const T* from) {
    if constexpr (sizeof(T) == sizeof(float)) {
        const float4 a = load<float4>(from), b = load<float4>(from + 4);
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    } else {
        const uint4 bits = load<uint4>(from);
        const float2 a = unpack<T>(bits.x), b = unpack<T>(bits.y), c = unpack<T>(bits.z),
                     d = unpack<T>(bits.w);
        return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
    }
}

template <class T>
__device__ __forceinline__ void store_eight(T* to, const Float8& x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        store_once(to, make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
        store_once(to + 4, make_float4(x.at[4], x.at[5], x.at[6], x.at[7]));
    } else {
        store_once(to, make_uint4(pack<T>(x.at[0], x.at[1]), pack<T>(x.at[2], x.at[3]),
                                  pack<T>(x.at[4], x.at[5]), pack<T>(x.at[6], x.at[7])));
    }
}

// For what is read again soon, in any memory.
__device__ __forceinline__ void store_sums(float* to, const Float8& x) {
    store(to, make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
    store(to + 4, make_float4(x.at[4], x.at[5], x.at[6], x.at[7]));
}

}  // namespace fastvideo::cuda
