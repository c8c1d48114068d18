// SPDX-License-Identifier: Apache-2.0
// Fragments are laid out as the PTX manual says: lane / 4 is a row of A and C (and that plus 8) or
// a column of B, lane % 4 a pair of columns of A and C or of rows of B (and those plus 8).
#include "emulator/tensor_core.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "emulator/engine.h"

namespace fastvideo::emulator {

float float_of_bfloat16(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float float_of_float16(uint16_t bits) {
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // exact, for subnormals too
    uint32_t result = std::bit_cast<uint32_t>(scaled);
    if ((bits & 0x7c00) == 0x7c00) result = magnitude | 0x7f800000u;  // infinity or NaN
    return std::bit_cast<float>(result | static_cast<uint32_t>(bits & 0x8000) << 16);
}

uint16_t bfloat16_of_float(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fff;
    bits += 0x7fff + (bits >> 16 & 1);
    return static_cast<uint16_t>(bits >> 16);
}

uint16_t float16_of_float(float value) {
    const auto rounded = static_cast<_Float16>(value);
    return std::bit_cast<uint16_t>(rounded);
}

void load_matrices(uint32_t (&fragment)[4], uint32_t address, bool transposed) {
    struct Lane {
        uint32_t (*fragment)[4];
        uint32_t address;
        bool transposed;
    } mine{&fragment, address, transposed};
    warp_collective("ldmatrix", ~0u, mine, [](Lane* const* lanes) {
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            uint16_t rows[8][8];
            for (unsigned row = 0; row < 8; ++row)
                std::memcpy(rows[row],
                            shared_pointer(lanes[matrix * 8 + row]->address, 16, 16, "ldmatrix"),
                            16);
            for (unsigned lane = 0; lane < kWarp; ++lane) {
                const unsigned i = lane / 4, j = lane % 4 * 2;
                const bool transposed = lanes[lane]->transposed;
                const uint32_t low = transposed ? rows[j][i] : rows[i][j];
                const uint32_t high = transposed ? rows[j + 1][i] : rows[i][j + 1];
                (*lanes[lane]->fragment)[matrix] = low | high << 16;
            }
        }
    });
}

void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16) {
    struct Lane {
        float (*c)[4];
        const uint32_t (*a)[4];
        const uint32_t (*b)[2];
        bool is_bf16;
    } mine{&c, &a, &b, is_bf16};
    warp_collective("mma", ~0u, mine, [](Lane* const* lanes) {
        const auto decode = lanes[0]->is_bf16 ? float_of_bfloat16 : float_of_float16;
        float a[16][16], b[16][8], c[16][8];
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            const unsigned i = lane / 4, j = lane % 4 * 2;
            for (unsigned half = 0; half < 2; ++half) {
                for (unsigned part = 0; part < 4; ++part)
                    a[i + part % 2 * 8][j + part / 2 * 8 + half] =
                        decode(static_cast<uint16_t>((*lanes[lane]->a)[part] >> 16 * half));
                for (unsigned part = 0; part < 2; ++part) {
                    b[j + part * 8 + half][i] =
                        decode(static_cast<uint16_t>((*lanes[lane]->b)[part] >> 16 * half));
                    c[i + part * 8][j + half] = (*lanes[lane]->c)[part * 2 + half];
                }
            }
        }
        for (unsigned i = 0; i < 16; ++i)
            for (unsigned k = 0; k < 16; ++k)
                for (unsigned j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
        for (unsigned lane = 0; lane < kWarp; ++lane)
            for (unsigned part = 0; part < 4; ++part)
                (*lanes[lane]->c)[part] = c[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
        counters().tensor_core_flops += 2 * 16 * 8 * 16;
    });
}

}  // namespace fastvideo::emulator
