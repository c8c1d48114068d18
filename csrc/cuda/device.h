// SPDX-License-Identifier: Apache-2.0
// What kernels use beside CUDA's own intrinsics: PTX instructions and the two 16-bit formats, the
// same for nvcc and for the emulator (csrc/emulator), in which g++ compiles the kernels for tests.
//
// To run in both, a kernel keeps shared memory dynamic (`dynamic_shared()`), loads and stores
// vectors by `load` and `store`, and takes from CUDA what csrc/emulator/intrinsics.h lists.
#pragma once

#include <cstdint>

#ifdef FASTVIDEO_EMULATOR
#include "emulator/intrinsics.h"
#include "emulator/tensor_core.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastvideo::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// ---- 16-bit formats ----------------------------------------------------------------------------

#ifdef FASTVIDEO_EMULATOR

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float to_float(BFloat16 value) { return emulator::float_of_bfloat16(value.bits); }
inline float to_float(Float16 value) { return emulator::float_of_float16(value.bits); }

template <class T>
T from_float(float value);
template <>
inline BFloat16 from_float<BFloat16>(float value) {
    return {emulator::bfloat16_of_float(value)};
}
template <>
inline Float16 from_float<Float16>(float value) {
    return {emulator::float16_of_float(value)};
}

// Two numbers as one register, the first in the low half.
template <class T>
uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
float2 unpack(uint32_t pair) {
    return {to_float(T{static_cast<uint16_t>(pair)}),
            to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

#else

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
    return __float2half_rn(value);
}

// Two numbers as one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t pair;
    if constexpr (sizeof(T) == sizeof(BFloat16) && __is_same(T, BFloat16))
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    if constexpr (__is_same(T, BFloat16)) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    } else {
        float2 both;
        asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; "
            "cvt.f32.f16 %1, high;}"
            : "=f"(both.x), "=f"(both.y)
            : "r"(pair));
        return both;
    }
}

#endif

__device__ __forceinline__ float to_float(float value) { return value; }
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

// ---- fast functions: two units in the last place or so ------------------------------------------

// 2^x; 0 for minus infinity.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef FASTVIDEO_EMULATOR
    return std::exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Base-2 logarithm; minus infinity for 0.
__device__ __forceinline__ float log2_approx(float x) {
#ifdef FASTVIDEO_EMULATOR
    return std::log2(x);
#else
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float rsqrt_approx(float x) {
#ifdef FASTVIDEO_EMULATOR
    return 1.0f / std::sqrt(x);
#else
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ---- memory ------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes; launch() says how much there is.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef FASTVIDEO_EMULATOR
    return emulator::dynamic_shared();
#else
    extern __shared__ __align__(1024) unsigned char fastvideo_shared[];
    return fastvideo_shared;
#endif
}

// A pointer into shared memory as the number that PTX instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#ifdef FASTVIDEO_EMULATOR
    return emulator::shared_address(pointer);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// A vector type (uint4, float2, ...) from or to any memory, in one access.
template <class V>
__device__ __forceinline__ V load(const void* from) {
#ifdef FASTVIDEO_EMULATOR
    emulator::check_aligned(from, sizeof(V), "load");
#endif
    return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store(void* to, V value) {
#ifdef FASTVIDEO_EMULATOR
    emulator::check_aligned(to, sizeof(V), "store");
#endif
    *static_cast<V*>(to) = value;
}

// The same for global memory that no one touches again soon: caches give it up first.
template <class V>
__device__ __forceinline__ V load_once(const void* from) {
#ifdef FASTVIDEO_EMULATOR
    return load<V>(from);
#else
    return __ldcs(static_cast<const V*>(from));
#endif
}
template <class V>
__device__ __forceinline__ void store_once(void* to, V value) {
#ifdef FASTVIDEO_EMULATOR
    store(to, value);
#else
    __stcs(static_cast<V*>(to), value);
#endif
}

// Copies 16 bytes from global to shared memory, or writes zeros there and reads nothing. The thread
// itself sees them after copy_async_wait, others after a barrier that follows it.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool valid = true) {
#ifdef FASTVIDEO_EMULATOR
    emulator::copy_async(to, from, 16, valid);
#else
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#endif
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_async_4(uint32_t to, const void* from, bool valid = true) {
#ifdef FASTVIDEO_EMULATOR
    emulator::copy_async(to, from, 4, valid);
#else
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes)
                 : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef FASTVIDEO_EMULATOR
    emulator::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the `pending` latest groups are under way.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef FASTVIDEO_EMULATOR
    emulator::copy_async_wait(pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- barriers of some of the block's warps -----------------------------------------------------

// Barrier 0 is that of __syncthreads; `num_threads` counts those that wait and those that arrive.
__device__ __forceinline__ void barrier_sync(int id, int num_threads) {
#ifdef FASTVIDEO_EMULATOR
    emulator::barrier(static_cast<unsigned>(id), static_cast<unsigned>(num_threads), true);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive(int id, int num_threads) {
#ifdef FASTVIDEO_EMULATOR
    emulator::barrier(static_cast<unsigned>(id), static_cast<unsigned>(num_threads), false);
#else
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}

// ---- tensor cores ------------------------------------------------------------------------------

// Loads four 8x8 matrices of 16-bit numbers: lanes 8i to 8i + 7 give the addresses of the rows of
// matrix i, and lane l gets numbers 2(l % 4) and the next of its row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
#ifdef FASTVIDEO_EMULATOR
    emulator::load_matrices(fragment, address, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
#endif
}
// The same of the transposed matrices: numbers 2(l % 4) and the next of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4],
                                                         uint32_t address) {
#ifdef FASTVIDEO_EMULATOR
    emulator::load_matrices(fragment, address, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
#endif
}

// c (16x8) += a (16x16, rows) * b (16x8, columns). Lane l holds c[l / 4 and + 8][2(l % 4) and + 1].
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b_low,
                                    uint32_t b_high) {
#ifdef FASTVIDEO_EMULATOR
    emulator::mma_16x8x16(c, a, {b_low, b_high}, __is_same(T, BFloat16));
#else
    if constexpr (__is_same(T, BFloat16))
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
#endif
}

}  // namespace fastvideo::cuda
