// SPDX-License-Identifier: Apache-2.0
// Layout of the packed tiles and the scratch memory of fine attention on the CPU.
#pragma once

#include <cmath>

#include "cpu/exp2.h"
#include "vsa/kernels_cpu.h"
#include "vsa/pack.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

using vsa::HeadRows;
using vsa::kTileTokens;
using vsa::OwnedTile;
using vsa::Tile;

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

inline float softmax_scale(int head_dim) { return 1.0f / sqrtf(static_cast<float>(head_dim)); }

// Sizes of the packed forms of a tile, in units.
template <class Unit>
struct Shapes {
    int channels;

    int channel_steps() const { return steps<Unit>(channels); }
    static constexpr int kTokenSteps = steps<Unit>(kTileTokens);
    int row_width() const { return round_up(channels, kPanel); }

    // Tokens by channels as a left factor, and as a right factor summed over channels or tokens.
    Panels left() const { return {kLeftWidth, channel_steps()}; }
    Panels transposed() const { return {kPanel, channel_steps()}; }
    static constexpr Panels rows() { return {kPanel, kTokenSteps}; }
    int left_size() const { return kLeftWidth * channel_steps(); }
    int transposed_size() const { return kTileTokens * channel_steps(); }
    int rows_size() const { return row_width() * kTokenSteps; }
    int sums_size() const { return kTileTokens * row_width(); }
};
inline constexpr int kScores = kTileTokens * kLeftWidth;

// Deals out consecutive runs of memory; with a null base it only counts.
struct Carver {
    std::byte* base;
    size_t used = 0;

    template <class T>
    T* take(size_t count) {
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return at;
    }
};

template <class T>
inline const T* row(const HeadRows& rows, int64_t token) {
    return static_cast<const T*>(rows.data) + token * rows.token;
}
template <class T>
inline T* mutable_row(const HeadRows& rows, int64_t token) {
    return static_cast<T*>(rows.data) + token * rows.token;
}

// Calls use(channel, count) for each vector of channels; count is below kWidth in the last.
template <class Use>
inline void for_vectors(int channels, Use use) {
    for (int channel = 0; channel < channels; channel += kWidth)
        use(channel, std::min(kWidth, channels - channel));
}
template <class T>
inline Floats load_some(const T* from, int count) {
    return count == kWidth ? load(from) : load_first(from, count);
}
template <class T>
inline void store_some(T* to, Floats value, int count) {
    if (count == kWidth)
        store(to, value);
    else
        store_first(to, value, count);
}

// Writes zeros to the rows that a tile owns but has no tokens in.
template <class T>
inline void zero_padding(const HeadRows& rows, const OwnedTile& tile, int channels) {
    for (int token = tile.begin; token < tile.end; ++token)
        if (token < tile.first || token >= tile.first + tile.tokens)
            std::memset(mutable_row<T>(rows, token), 0, channels * sizeof(T));
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
