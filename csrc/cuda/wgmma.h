// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup (wgmma, sm_90a): four neighbouring warps, the first of which has a
// number divisible by 4, add A (64x16) * B (16xN) to accumulators in their registers.
//
// Thread t of the group holds d[4j + 2h + i] = D[16 (t / 32) + (t % 32) / 4 + 8h][8j + 2 (t % 4) +
// i] and, where A is in registers, in the halves i of a[2u + h] A of those rows and k = 8u + 2 (t %
// 4)
// + i. So accumulators of 16 columns, rounded and packed in order, are an A of the next product.
//
// Products run in the background: between wgmma() and the wgmma_wait() that covers it, no register
// it reads or writes and no shared memory it reads may change.
#pragma once

#include "cuda/hopper.h"

namespace fastvideo::cuda {

// ---- operands in shared memory -----------------------------------------------------------------

// Operands are boxes of rows of 128 bytes (64 numbers), stacked, that a bulk copy has swizzled:
// bits 4 to 6 of an address are those of the place without swizzle xor its bits 7 to 9. The pattern
// repeats every 8 rows, and starts at multiples of 1024 bytes.
inline constexpr int kBoxColumns = 64;
inline constexpr uint32_t kBoxRowBytes = 128;
inline constexpr uint32_t kPatternBytes = 8 * kBoxRowBytes;

// A matrix descriptor: bits 0-13 address, 16-29 leading offset, 32-45 stride offset, all of them in
// 16 bytes; bits 62-63 swizzle, of which 1 is that of 128 bytes. `offset` is added to the address;
// as shared addresses stay below 2^18 without clusters, that is one addition of 32 bits for a
// product.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t offset,
                                               uint32_t leading_bytes, uint32_t stride_bytes) {
    const uint32_t low = (address >> 4) + ((offset >> 4) + (leading_bytes >> 4 << 16));
    const uint32_t high = stride_bytes >> 4 | 1u << 30;
    return static_cast<uint64_t>(high) << 32 | low;
}

// Rows are rows of A or columns of B, channels 16 `step` on are k ("K-major"). `box_bytes` lie
// between the boxes of 64 channels. The stride is that from 8 rows to the next; the leading offset
// has no meaning here. Within the 128 bytes of the pattern the address just moves on.
__device__ __forceinline__ uint64_t rows_by_channels(uint32_t tile, int step, uint32_t box_bytes) {
    return descriptor(tile, step / 4 * box_bytes + step % 4 * 32, 16, kPatternBytes);
}

// Channels are columns of B, rows 16 `step` on are k ("MN-major", to be transposed). The leading
// offset is that from 64 columns to the next, the stride that from 8 rows of k to the next.
__device__ __forceinline__ uint64_t channels_by_rows(uint32_t tile, int step, uint32_t box_bytes) {
    return descriptor(tile, step * 2 * kPatternBytes, box_bytes, kPatternBytes);
}

enum class B { kRowsByChannels, kChannelsByRows };

// ---- order -------------------------------------------------------------------------------------

// Before the first product, and again whenever ordinary code has touched registers of the next one.
__device__ __forceinline__ void wgmma_fence() {
#ifdef FASTVIDEO_EMULATOR
    emulator::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() {
#ifdef FASTVIDEO_EMULATOR
    emulator::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most the `pending` latest groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef FASTVIDEO_EMULATOR
    emulator::wgmma_wait(pending);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// For the compiler, which takes a product for done when issued: registers are neither read nor
// written across this line. Belongs before wgmma_fence() and after wgmma_wait().
template <class Register, int n>
__device__ __forceinline__ void pin([[maybe_unused]] Register (&registers)[n]) {
#ifndef FASTVIDEO_EMULATOR
#pragma unroll
    for (int i = 0; i < n; ++i) {
        if constexpr (__is_same(Register, float))
            asm volatile("" : "+f"(registers[i])::"memory");
        else
            asm volatile("" : "+r"(registers[i])::"memory");
    }
#endif
}

// ---- products ----------------------------------------------------------------------------------

#ifndef FASTVIDEO_EMULATOR

// Accumulators as registers of the instruction, and as operands of asm.
#define FASTVIDEO_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTVIDEO_REGISTERS_16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTVIDEO_REGISTERS_24                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23"
#define FASTVIDEO_REGISTERS_32                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
    "%30, %31"
#define FASTVIDEO_REGISTERS_64                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
    "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
    "%58, %59, %60, %61, %62, %63"
#define FASTVIDEO_D8(C, i)                                                                 \
    C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), \
        C(d[i + 7])
#define FASTVIDEO_D16(C, i) FASTVIDEO_D8(C, i), FASTVIDEO_D8(C, i + 8)
#define FASTVIDEO_D32(C, i) FASTVIDEO_D16(C, i), FASTVIDEO_D16(C, i + 16)
#define FASTVIDEO_UNWRAP(...) __VA_ARGS__

// The operands behind the accumulators are: whether to accumulate, B's descriptor, whether B is
// transposed, A. 1, 1: neither A nor B is negated. A in shared memory is never transposed (the 0).
#define FASTVIDEO_WGMMA(N, D, OUTPUTS, P, BD, TRANSPOSED, A, TYPES, AFTER_SIGNS, INPUTS)        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                          \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" D "}, " A ", " BD \
                 ", p, 1, 1, " AFTER_SIGNS TRANSPOSED ";\n}"                                    \
                 : FASTVIDEO_UNWRAP OUTPUTS                                                     \
                 : "n"(accumulate), "l"(b), "n"(layout == B::kChannelsByRows),                  \
                   FASTVIDEO_UNWRAP INPUTS)
#define FASTVIDEO_WGMMA_A_REGISTERS(TYPES, C)                                                   \
    if constexpr (N == 16)                                                                      \
        FASTVIDEO_WGMMA(16, FASTVIDEO_REGISTERS_8, (FASTVIDEO_D8(C, 0)), "%8", "%9", "%10",     \
                        "{%11, %12, %13, %14}", TYPES, "",                                      \
                        ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])));                          \
    if constexpr (N == 32)                                                                      \
        FASTVIDEO_WGMMA(32, FASTVIDEO_REGISTERS_16, (FASTVIDEO_D16(C, 0)), "%16", "%17", "%18", \
                        "{%19, %20, %21, %22}", TYPES, "",                                      \
                        ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])));                          \
    if constexpr (N == 48)                                                                      \
        FASTVIDEO_WGMMA(48, FASTVIDEO_REGISTERS_24, (FASTVIDEO_D16(C, 0), FASTVIDEO_D8(C, 16)), \
                        "%24", "%25", "%26", "{%27, %28, %29, %30}", TYPES, "",                 \
                        ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])));                          \
    if constexpr (N == 64)                                                                      \
        FASTVIDEO_WGMMA(64, FASTVIDEO_REGISTERS_32, (FASTVIDEO_D32(C, 0)), "%32", "%33", "%34", \
                        "{%35, %36, %37, %38}", TYPES, "",                                      \
                        ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])));                          \
    if constexpr (N == 128)                                                                     \
    FASTVIDEO_WGMMA(128, FASTVIDEO_REGISTERS_64, (FASTVIDEO_D32(C, 0), FASTVIDEO_D32(C, 32)),   \
                    "%64", "%65", "%66", "{%67, %68, %69, %70}", TYPES, "",                     \
                    ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])))
#define FASTVIDEO_WGMMA_A_SHARED(TYPES, C)                                                         \
    if constexpr (N == 16)                                                                         \
        FASTVIDEO_WGMMA(16, FASTVIDEO_REGISTERS_8, (FASTVIDEO_D8(C, 0)), "%8", "%9", "%10", "%11", \
                        TYPES, "0, ", ("l"(a)));                                                   \
    if constexpr (N == 32)                                                                         \
        FASTVIDEO_WGMMA(32, FASTVIDEO_REGISTERS_16, (FASTVIDEO_D16(C, 0)), "%16", "%17", "%18",    \
                        "%19", TYPES, "0, ", ("l"(a)));                                            \
    if constexpr (N == 48)                                                                         \
        FASTVIDEO_WGMMA(48, FASTVIDEO_REGISTERS_24, (FASTVIDEO_D16(C, 0), FASTVIDEO_D8(C, 16)),    \
                        "%24", "%25", "%26", "%27", TYPES, "0, ", ("l"(a)));                       \
    if constexpr (N == 64)                                                                         \
        FASTVIDEO_WGMMA(64, FASTVIDEO_REGISTERS_32, (FASTVIDEO_D32(C, 0)), "%32", "%33", "%34",    \
                        "%35", TYPES, "0, ", ("l"(a)));                                            \
    if constexpr (N == 128)                                                                        \
    FASTVIDEO_WGMMA(128, FASTVIDEO_REGISTERS_64, (FASTVIDEO_D32(C, 0), FASTVIDEO_D32(C, 32)),      \
                    "%64", "%65", "%66", "%67", TYPES, "0, ", ("l"(a)))
#define FASTVIDEO_WGMMA_A_REGISTERS_OF(TYPES)     \
    if constexpr (accumulate) {                   \
        FASTVIDEO_WGMMA_A_REGISTERS(TYPES, "+f"); \
    } else {                                      \
        FASTVIDEO_WGMMA_A_REGISTERS(TYPES, "=f"); \
    }
#define FASTVIDEO_WGMMA_A_SHARED_OF(TYPES)     \
    if constexpr (accumulate) {                \
        FASTVIDEO_WGMMA_A_SHARED(TYPES, "+f"); \
    } else {                                   \
        FASTVIDEO_WGMMA_A_SHARED(TYPES, "=f"); \
    }

#endif

// d += A * B, or d = A * B; 64xN, A in registers. All registers of d must hold numbers to
// accumulate to: with undefined ones ptxas lets products wait for each other (C7511), and so it
// does where pin() is given undefined ones.
template <class T, int N, B layout, bool accumulate = true, int n>
__device__ __forceinline__ void wgmma(float (&d)[n], const uint32_t (&a)[4], uint64_t b) {
    static_assert(n >= N / 2);
#ifdef FASTVIDEO_EMULATOR
    emulator::wgmma(d, N, a, b, layout == B::kChannelsByRows, accumulate, __is_same(T, BFloat16));
#else
    if constexpr (__is_same(T, BFloat16)) {
        FASTVIDEO_WGMMA_A_REGISTERS_OF("bf16.bf16");
    } else {
        FASTVIDEO_WGMMA_A_REGISTERS_OF("f16.f16");
    }
#endif
}

// The same with A in shared memory, rows by channels.
template <class T, int N, B layout, bool accumulate = true, int n>
__device__ __forceinline__ void wgmma(float (&d)[n], uint64_t a, uint64_t b) {
    static_assert(n >= N / 2);
#ifdef FASTVIDEO_EMULATOR
    emulator::wgmma(d, N, a, b, layout == B::kChannelsByRows, accumulate, __is_same(T, BFloat16));
#else
    if constexpr (__is_same(T, BFloat16)) {
        FASTVIDEO_WGMMA_A_SHARED_OF("bf16.bf16");
    } else {
        FASTVIDEO_WGMMA_A_SHARED_OF("f16.f16");
    }
#endif
}

}  // namespace fastvideo::cuda
