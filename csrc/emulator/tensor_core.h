// SPDX-License-Identifier: Apache-2.0
// The 16-bit formats and the warp's matrix instructions, in plain C++.
#pragma once

#include <cstdint>

namespace fastvideo::emulator {

float float_of_bfloat16(uint16_t bits);
float float_of_float16(uint16_t bits);
// Round to nearest, ties to even.
uint16_t bfloat16_of_float(float value);
uint16_t float16_of_float(float value);

// ldmatrix.x4: each of 32 lanes gives the address of 8 numbers of 16 bits.
void load_matrices(uint32_t (&fragment)[4], uint32_t address, bool transposed);

// mma.m16n8k16, row times column, added to float32.
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16);

}  // namespace fastvideo::emulator
