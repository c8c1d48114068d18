// SPDX-License-Identifier: Apache-2.0
// Brings rows of tokens into the two forms that the matrix products read; see product.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vsa/product.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

#if defined(__AVX512BF16__) || defined(FASTVIDEO_PORTABLE_PAIRS)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

// What tensors of T are multiplied as: anything but pairs of bfloat16 is widened when packed.
template <class T>
using UnitOf = std::conditional_t<kHasPairs && std::is_same_v<T, BFloat16>, Pair, float>;

// Numbers in a unit.
template <class Unit>
inline constexpr int kNumbers = std::is_same_v<Unit, Pair> ? 2 : 1;

// Units that hold `numbers`.
template <class Unit>
constexpr int steps(int numbers) {
    return (numbers + kNumbers<Unit> - 1) / kNumbers<Unit>;
}

constexpr int round_up(int value, int multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Where a packed matrix has its (step, column): in panels of `width` columns and `depth` steps.
struct Panels {
    int width, depth;

    constexpr int at(int step, int column) const {
        return (column / width * depth + step) * width + column % width;
    }
};

// A left factor is one panel. Its width is no power of two, or the few columns that a block reads
// of each step would fall into a few sets of the cache.
inline constexpr int kLeftWidth = 80;

// The bits of bfloat16 that are nearest to each number.
inline Words rounded_bits(Floats value) {
    BFloat16 whole[kWidth];
    store(whole, value);
    return __builtin_convertvector(bits_as<Halves>(whole), Words);
}
inline Words pair_of(Floats lower, Floats upper) {
    return rounded_bits(lower) | rounded_bits(upper) << 16;
}

// The units that begin at the number `from`, of which `left` numbers are there; zeros follow.
template <class Unit, class T>
inline Floats load_units(const T* from, int left) {
    constexpr int kFull = kWidth * kNumbers<Unit>;
    if (left <= 0) return Floats{};
    if constexpr (std::is_same_v<Unit, Pair>) {
        T whole[kFull] = {};
        std::memcpy(whole, from, std::min(left, kFull) * sizeof(T));
        return bits_as<Floats>(whole);
    } else {
        return left >= kFull ? load(from) : load_first(from, left);
    }
}

// Transposes a square of 32-bit units: in step s, lanes that differ in bit s change places.
inline void transpose(Floats (&rows)[kWidth]) {
    const Ints lane = [] {
        Ints lanes;
        for (int i = 0; i < kWidth; ++i) lanes[i] = i;
        return lanes;
    }();
#pragma GCC unroll 4
    for (int s = 1; s < kWidth; s *= 2) {
        const Ints upper = (lane & s) != 0;
        const Ints first = upper ? lane + kWidth - s : lane;
        const Ints second = upper ? lane + kWidth : lane + s;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
            if (i & s) continue;
            const Floats a = rows[i], b = rows[i + s];
            rows[i] = __builtin_shuffle(a, b, first);
            rows[i + s] = __builtin_shuffle(a, b, second);
        }
    }
}

// Channels become steps, tokens become columns: to(c, t) = from[t * stride + c]; zeros for tokens
// up to a whole vector and in half a pair.
template <class Unit, class T>
inline void pack_transposed(const T* from, int64_t stride, int tokens, int channels, Unit* to,
                            Panels panels) {
    const int num_steps = steps<Unit>(channels);
    for (int token = 0; token < tokens; token += kWidth) {
        for (int step = 0; step < num_steps; step += kWidth) {
            const int channel = step * kNumbers<Unit>;
            Floats rows[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                rows[i] = token + i < tokens
                              ? load_units<Unit>(from + (token + i) * stride + channel,
                                                 channels - channel)
                              : Floats{};
            transpose(rows);
            const int last = std::min(kWidth, num_steps - step);
            for (int i = 0; i < last; ++i)
                std::memcpy(to + panels.at(step + i, token), &rows[i], sizeof(Floats));
        }
    }
}

// Tokens become steps, channels stay columns: to(t, c) = from[t * stride + c]; zeros for channels
// up to a whole vector and for the token that half a pair lacks.
template <class Unit, class T>
inline void pack_rows(const T* from, int64_t stride, int tokens, int channels, Unit* to,
                      Panels panels) {
    const int num_steps = steps<Unit>(tokens);
    for (int step = 0; step < num_steps; ++step) {
        const int token = step * kNumbers<Unit>;
        const T* row = from + token * stride;
        for (int channel = 0; channel < channels; channel += kWidth) {
            const int left = channels - channel;
            Floats units = load_units<float>(row + channel, left);
            if constexpr (std::is_same_v<Unit, Pair>) {
                const Floats next =
                    token + 1 < tokens ? load_units<float>(row + stride + channel, left) : Floats{};
                // A widened bfloat16 is its bits in the upper half.
                units = bits_as<Floats>(bits_as<Words>(units) >> 16 | bits_as<Words>(next));
            }
            std::memcpy(to + panels.at(step, channel), &units, sizeof(units));
        }
    }
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
