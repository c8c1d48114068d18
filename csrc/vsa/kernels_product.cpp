// SPDX-License-Identifier: Apache-2.0
// Matrix products in blocks that fit the registers; see product.h.
#include <type_traits>
#include <utility>

#include "vsa/product.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

namespace {

inline Floats fused(float a, const float* b, Floats sum) { return splat(a) * load(b) + sum; }

inline Floats fused(Pair a, const Pair* b, Floats sum) {
    Words pairs;
    std::memcpy(&pairs, b, sizeof(pairs));
    const Words twice = a.bits + Words{};
#if defined(__AVX512BF16__)
    return bits_as<Floats>(
        _mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(twice), bits_as<__m512bh>(pairs)));
#else
    sum += bits_as<Floats>(twice << 16) * bits_as<Floats>(pairs << 16);
    return sum + bits_as<Floats>(twice & 0xffff0000u) * bits_as<Floats>(pairs & 0xffff0000u);
#endif
}

template <class Unit>
using Block = void (*)(const Unit* a, int a_stride, const Unit* b, int depth, float* c,
                       int c_stride);

template <bool kAdd, class Unit, int kRows, int kVectors>
void block(const Unit* a, int a_stride, const Unit* b, int depth, float* c, int c_stride) {
    Floats sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v)
            sum[row][v] = kAdd ? load(c + row * c_stride + v * kWidth) : Floats{};
    for (int step = 0; step < depth; ++step, a += a_stride, b += kPanel) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; ++v)
                sum[row][v] = fused(a[row], b + v * kWidth, sum[row][v]);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) store(c + row * c_stride + v * kWidth, sum[row][v]);
}

// blocks[vectors - 1][rows - 1]
template <bool kAdd, class Unit>
struct Blocks {
    Block<Unit> of[kBlockVectors][kBlockRows];

    template <int... kRows>
    constexpr explicit Blocks(std::integer_sequence<int, kRows...>)
        : of{{block<kAdd, Unit, kRows + 1, 1>...}, {block<kAdd, Unit, kRows + 1, 2>...}} {}
};
static_assert(kBlockVectors == 2);

template <bool kAdd, class Unit>
void product(const Unit* a, int a_stride, const Unit* b, int b_depth, int depth, int rows,
             int columns, float* c, int c_stride) {
    static constexpr Blocks<kAdd, Unit> blocks{std::make_integer_sequence<int, kBlockRows>{}};
    // Blocks of almost equal heights: a low one would wait for its few sums to become ready.
    const int num_blocks = (rows + kBlockRows - 1) / kBlockRows;
    // A panel of b stays in the first cache while the rows of a, from the second, pass by.
    for (int column = 0; column < columns; column += kPanel, b += b_depth * kPanel) {
        const int left = columns - column;
        const auto& of_rows = blocks.of[left > kWidth ? 1 : 0];
        for (int i = 0, row = 0; i < num_blocks; ++i) {
            const int height = (rows - row + num_blocks - i - 1) / (num_blocks - i);
            of_rows[height - 1](a + row, a_stride, b, depth, c + row * c_stride + column, c_stride);
            row += height;
        }
    }
}

}  // namespace

template <class Unit>
void multiply(const Unit* a, int a_stride, const Unit* b, int b_depth, int depth, int rows,
              int columns, float* c, int c_stride) {
    product<false>(a, a_stride, b, b_depth, depth, rows, columns, c, c_stride);
}
template <class Unit>
void multiply_add(const Unit* a, int a_stride, const Unit* b, int b_depth, int depth, int rows,
                  int columns, float* c, int c_stride) {
    product<true>(a, a_stride, b, b_depth, depth, rows, columns, c, c_stride);
}

#define FASTVIDEO_PRODUCTS(Unit)                                                            \
    template void multiply(const Unit*, int, const Unit*, int, int, int, int, float*, int); \
    template void multiply_add(const Unit*, int, const Unit*, int, int, int, int, float*, int)
FASTVIDEO_PRODUCTS(float);
FASTVIDEO_PRODUCTS(Pair);

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
