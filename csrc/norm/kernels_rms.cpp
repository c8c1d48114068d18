// SPDX-License-Identifier: Apache-2.0
// RMS norm of heads, or across the heads of a token, with rotary positions; compiled once per
// instruction set.
#include <algorithm>
#include <cmath>

#include "norm/channels.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

namespace {

// Channels 2i and 2i + 1 change places.
FASTVIDEO_INLINE inline Floats swap_pairs(Floats value) {
    Ints order;
    for (int i = 0; i < kWidth; ++i) order[i] = i ^ 1;
    return __builtin_shuffle(value, order);
}

// cos twice, and sin with the sign it has for each channel of a pair.
void spread(const Rotary& rotary, int64_t token, int64_t dim, float* cos, float* sin) {
    const float* from_cos = rotary.cos + token * rotary.cos_token;
    const float* from_sin = rotary.sin + token * rotary.sin_token;
    for (int64_t pair = 0; pair < dim / 2; ++pair) {
        cos[2 * pair] = cos[2 * pair + 1] = from_cos[pair * rotary.cos_pair];
        sin[2 * pair + 1] = from_sin[pair * rotary.sin_pair];
        sin[2 * pair] = -sin[2 * pair + 1];
    }
}

template <class T>
void widen_weight(const Rms& p, int64_t channels, float* to) {
    const Vector<T> weight(p.weight);
    for_channels(channels, [&](int64_t d, int, auto extent)
                               FASTVIDEO_INLINE { store(to + d, weight.at(d, extent, 1)); });
}

int64_t channels_of_weight(const Rms& p) { return p.across_heads ? p.heads * p.dim : p.dim; }

// What one root mean square is of: heads from `first` to `last` of a token.
struct Span {
    int64_t batch, token, first, last;
    int64_t index;  // of rstd
};

template <class Body>
FASTVIDEO_INLINE inline void for_spans(const Rms& p, int64_t row, const Body& body) {
    const int64_t batch = row / p.tokens, token = row % p.tokens;
    if (p.across_heads) {
        body(Span{batch, token, 0, p.heads, row});
        return;
    }
    for (int64_t head = 0; head < p.heads; ++head)
        body(Span{batch, token, head, head + 1, row * p.heads + head});
}

// body(head, where its weights start)
template <class Body>
FASTVIDEO_INLINE inline void for_heads(const Rms& p, const Span& at, const Body& body) {
    for (int64_t head = at.first; head < at.last; ++head)
        body(head, p.across_heads ? head * p.dim : 0);
}

template <class T>
void forward(const RmsForward& p, int64_t first_token, int64_t last_token) {
    Scratch weights(1, channels_of_weight(p)), scratch(2, p.dim);
    float *cos = scratch[0], *sin = scratch[1];
    widen_weight<T>(p, channels_of_weight(p), weights[0]);
    const int64_t num_averaged = channels_of_weight(p);
    for (int64_t row = first_token; row < last_token; ++row) {
        if (p.rotary.cos) spread(p.rotary, row % p.tokens, p.dim, cos, sin);
        const int64_t next = row + 1 < last_token ? row + 1 : row;
        for_spans(p, row, [&](const Span& at) {
            Sum squares;
            for_heads(p, at, [&](int64_t head, int64_t) {
                const T* x = row_of<T>(p.x, at.batch, at.token, head);
                for_channels(p.dim, [&](int64_t d, int chain, auto extent) FASTVIDEO_INLINE {
                    const Floats value = load(x + d, extent);
                    squares.chain[chain] += value * value;
                });
            });
            const float rstd = 1 / std::sqrt(squares.total() / num_averaged + p.eps);
            p.rstd[at.index] = rstd;
            for_heads(p, at, [&](int64_t head, int64_t start) {
                const T* x = row_of<T>(p.x, at.batch, at.token, head);
                const T* next_x = row_of<T>(p.x, next / p.tokens, next % p.tokens, head);
                const float* weight = weights[0] + start;
                T* out = row_of<T>(p.out, at.batch, at.token, head);
                const auto normed_at = [&](int64_t d, auto extent) FASTVIDEO_INLINE {
                    prefetch(next_x, d);
                    return load(x + d, extent) * rstd * load(weight + d, extent);
                };
                if (p.rotary.cos)
                    for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                        const Floats normed = normed_at(d, extent);
                        store(out + d, normed * load(cos + d) + swap_pairs(normed) * load(sin + d),
                              extent);
                    });
                else
                    for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                        store(out + d, normed_at(d, extent), extent);
                    });
            });
        });
    }
}

template <class T, bool kRotary>
void backward_of(const RmsBackward& p, const Split& split, int64_t first_task, int64_t last_task) {
    const int64_t channels = channels_of_weight(p);
    Scratch weights(2, channels), scratch(2, p.dim);
    float *cos = scratch[0], *sin = scratch[1];
    widen_weight<T>(p, channels, weights[0]);
    for (int64_t task = first_task; task < last_task; ++task) {
        float* dweights = weights[1];
        std::fill(dweights, dweights + channels, 0.0f);
        const int64_t first = std::min(task * split.piece_rows, split.group_rows);
        const int64_t last = std::min(first + split.piece_rows, split.group_rows);
        for (int64_t row = first; row < last; ++row) {
            if (kRotary) spread(p.rotary, row % p.tokens, p.dim, cos, sin);
            const int64_t next = row + 1 < last ? row + 1 : row;
            for_spans(p, row, [&](const Span& at) {
                const float rstd = p.rstd[at.index];
                // The rotation's transpose is the rotation back.
                const auto turned_back = [&](const T* grad, int64_t d,
                                             auto extent) FASTVIDEO_INLINE {
                    const Floats g = load(grad + d, extent);
                    if constexpr (kRotary)
                        return g * load(cos + d) - swap_pairs(g) * load(sin + d);
                    else
                        return g;
                };
                Sum of_grad_normed;
                for_heads(p, at, [&](int64_t head, int64_t start) {
                    const T* x = row_of<T>(p.x, at.batch, at.token, head);
                    const T* grad = row_of<T>(p.grad, at.batch, at.token, head);
                    const float* weight = weights[0] + start;
                    float* dweight = dweights + start;
                    for_channels(p.dim, [&](int64_t d, int chain, auto extent) FASTVIDEO_INLINE {
                        const Floats g = turned_back(grad, d, extent);
                        const Floats grad_weight = g * (load(x + d, extent) * rstd);
                        of_grad_normed.chain[chain] += grad_weight * load(weight + d, extent);
                        store(dweight + d, load(dweight + d, extent) + grad_weight, extent);
                    });
                });
                // dx = rstd * (scaled - normed * mean(scaled * normed)), normed = x * rstd
                const float mean = of_grad_normed.total() / channels * rstd * rstd;
                for_heads(p, at, [&](int64_t head, int64_t start) {
                    const T* x = row_of<T>(p.x, at.batch, at.token, head);
                    const T* grad = row_of<T>(p.grad, at.batch, at.token, head);
                    const T* next_x = row_of<T>(p.x, next / p.tokens, next % p.tokens, head);
                    const T* next_grad = row_of<T>(p.grad, next / p.tokens, next % p.tokens, head);
                    const float* weight = weights[0] + start;
                    T* dx = row_of<T>(p.dx, at.batch, at.token, head);
                    for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                        prefetch(next_x, d);
                        prefetch(next_grad, d);
                        const Floats scaled =
                            turned_back(grad, d, extent) * load(weight + d, extent);
                        store(dx + d, scaled * rstd - load(x + d, extent) * mean, extent);
                    });
                });
            });
        }
        if (p.dweight.data) std::copy(dweights, dweights + channels, p.task_sums + task * channels);
    }
}

template <class T>
void backward(const RmsBackward& p, const Split& split, int64_t first_task, int64_t last_task) {
    (p.rotary.cos ? backward_of<T, true> : backward_of<T, false>)(p, split, first_task, last_task);
}

// Adds what the tasks left, always in the same order; for channels from `first` to `last`.
template <class T>
void backward_sums(const RmsBackward& p, const Split& split, int64_t first, int64_t last) {
    const int64_t channels = channels_of_weight(p);
    const Vector<T> dweight(p.dweight);
    for_channels(last - first, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
        const float* sums = p.task_sums + first + d;
        Floats total{};
        for (int64_t task = 0; task < split.tasks; ++task, sums += channels)
            total += load(sums, extent);
        dweight.set(first + d, total, extent);
    });
}

template <class T>
constexpr RmsKernels kernels_of() {
    return {forward<T>, backward<T>, backward_sums<T>};
}

}  // namespace

const ByDtype<RmsKernels>& rms_kernels() {
    static constexpr ByDtype<RmsKernels> kernels{kernels_of<float>(), kernels_of<BFloat16>(),
                                                 kernels_of<Float16>()};
    return kernels;
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
