// SPDX-License-Identifier: Apache-2.0
// Powers of two of a whole vector, for softmax.
#pragma once

#include "cpu/simd.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

// 2^x to a relative 2e-7, NaN stays NaN; x counts as -126 below and as 127 above.
inline Floats exp2(Floats x) {
    // Adding it leaves round(x) + 127 in the lowest bits: the exponent of 2^round(x).
    constexpr float kRound = 12582912.0f + 127.0f;
    x = x < -126.0f ? splat(-126.0f) : x;
    x = x > 127.0f ? splat(127.0f) : x;
    const Floats rounded = x + kRound;
    const Floats rest = x - (rounded - kRound);
    // Minimax for the relative error on [-0.5, 0.5].
    Floats power = splat(1.326472731e-3f);
    power = power * rest + 9.671512991e-3f;
    power = power * rest + 5.550733581e-2f;
    power = power * rest + 2.402224243e-1f;
    power = power * rest + 6.931470037e-1f;
    power = power * rest + 1.0f;
    return power * bits_as<Floats>(bits_as<Words>(rounded) << 23);
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
