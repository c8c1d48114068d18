// SPDX-License-Identifier: Apache-2.0
// The one matrix product that attention on the CPU is made of, in blocks that fit the registers.
//
// Both factors are packed with the summed dimension outermost, so that a step of the innermost loop
// reads one run of memory of each. A step is one float32, or a pair of bfloat16 where the processor
// multiplies pairs.
#pragma once

#include "cpu/simd.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

// Two bfloat16, the lower half first in the sum.
struct Pair {
    uint32_t bits;
};

// Accumulators of a block, and beside them kBlockVectors loads and a broadcast, fill the registers:
// 32 of 16 floats, 16 of 8, or with SSE2 16 of 4, where one of our vectors takes two.
#if defined(__AVX512F__)
inline constexpr int kBlockRows = 12;
#elif defined(__AVX2__) || defined(__aarch64__)
inline constexpr int kBlockRows = 6;
#else
inline constexpr int kBlockRows = 3;
#endif
inline constexpr int kBlockVectors = 2;
inline constexpr int kPanel = kBlockVectors * kWidth;

// c[row][column] = the sum over `depth` steps of a[step][row] * b[column / kPanel][step][column %
// kPanel], where panels of b are `b_depth` steps apart. Columns are rounded up to kWidth.
template <class Unit>
void multiply(const Unit* a, int a_stride, const Unit* b, int b_depth, int depth, int rows,
              int columns, float* c, int c_stride);
// The same, added to c.
template <class Unit>
void multiply_add(const Unit* a, int a_stride, const Unit* b, int b_depth, int depth, int rows,
                  int columns, float* c, int c_stride);

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
