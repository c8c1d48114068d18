// SPDX-License-Identifier: Apache-2.0
// Layer norm with modulation, behind a gated residual or not; compiled once per instruction set.
//
// Weight, bias, scale and shift are folded into one factor and one offset for each channel:
//   out = normed * factor + offset, factor = weight * (1 + scale), offset = bias * (1 + scale) +
//   shift
// A backward therefore sums only grad * normed and grad over the tokens of a group; gradients of
// all four follow from these.
#include <algorithm>
#include <cmath>

#include "norm/channels.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

namespace {

// Consecutive tokens of one group.
struct Segment {
    int64_t index, piece;  // of the group, and which piece of it
    int64_t batch, group;  // the sample, and the group within it
    int64_t first, last;   // tokens of the sample
};

template <class Body>
void for_segments(const Tokens& p, const Split& split, int64_t task, const Body& body) {
    const int64_t piece = task % split.pieces;
    const int64_t begin = task / split.pieces * split.groups_per_task;
    const int64_t end = std::min(split.groups, begin + split.groups_per_task);
    for (int64_t index = begin; index < end; ++index) {
        const int64_t group = index % p.groups;
        const int64_t first = std::min(piece * split.piece_rows, split.group_rows);
        const int64_t last = std::min(first + split.piece_rows, split.group_rows);
        const int64_t start = group * split.group_rows;
        body(Segment{index, piece, index / p.groups, group, start + first, start + last});
    }
}

template <class T>
void widen(const Vectors& vectors, int64_t batch, int64_t group, int64_t dim, float* to) {
    const Vector<T> vector(vectors, batch, group);
    for_channels(dim, [&](int64_t d, int, auto extent)
                          FASTVIDEO_INLINE { store(to + d, vector.at(d, extent, 1)); });
}

template <class T>
void fold(const LayerForward& p, int64_t batch, int64_t group, float* factor, float* offset) {
    const Vector<T> weight(p.weight), bias(p.bias);
    const Vector<T> scale(p.scale, batch, group), shift(p.shift, batch, group);
    for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
        const Floats scaling = 1 + scale.at(d, extent, 0);
        store(factor + d, weight.at(d, extent, 1) * scaling);
        store(offset + d, bias.at(d, extent, 0) * scaling + shift.at(d, extent, 0));
    });
}

// sum = x + y * gate, and the sum of its channels as they were rounded.
template <class T>
Sum add_gated(const T* x, const T* y, const float* gate, int64_t dim, T* sum) {
    Sum total;
    for_channels(dim, [&](int64_t d, int chain, auto extent) FASTVIDEO_INLINE {
        store(sum + d, load(x + d, extent) + load(y + d, extent) * load(gate + d), extent);
        total.chain[chain] += load(sum + d, extent);
    });
    return total;
}

template <class T>
void forward(const LayerForward& p, int64_t first_row, int64_t last_row) {
    Scratch scratch(3, p.dim);
    float *factor = scratch[0], *offset = scratch[1], *gate = scratch[2];
    const int64_t group_rows = p.tokens / p.groups;
    int64_t folded = -1;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t batch = row / p.tokens, token = row % p.tokens, group = token / group_rows;
        if (folded != batch * p.groups + group) {
            folded = batch * p.groups + group;
            fold<T>(p, batch, group, factor, offset);
            if (p.y.data) widen<T>(p.gate, batch, group, p.dim, gate);
        }
        const T* x = row_of<T>(p.x, batch, token);
        Sum total;
        if (p.y.data) {
            T* sum = row_of<T>(p.sum, batch, token);
            total = add_gated(x, row_of<T>(p.y, batch, token), gate, p.dim, sum);
            x = sum;
        } else {
            for_channels(p.dim, [&](int64_t d, int chain, auto extent) FASTVIDEO_INLINE {
                total.chain[chain] += load(x + d, extent);
            });
        }
        const float mean = total.total() / p.dim;
        Sum squares;
        for_channels(p.dim, [&](int64_t d, int chain, auto extent) FASTVIDEO_INLINE {
            const Floats centred = within(load(x + d, extent) - mean, extent);
            squares.chain[chain] += centred * centred;
        });
        const float rstd = 1 / std::sqrt(squares.total() / p.dim + p.eps);
        const int64_t next = row + 1 < last_row ? row + 1 : row;
        const T* next_x = row_of<T>(p.x, next / p.tokens, next % p.tokens);
        const T* next_y = row_of<T>(p.y, next / p.tokens, next % p.tokens);
        T* out = row_of<T>(p.out, batch, token);
        for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
            prefetch(next_x, d);
            prefetch(next_y, d);
            const Floats normed = (load(x + d, extent) - mean) * rstd;
            store(out + d, normed * load(factor + d) + load(offset + d), extent);
        });
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
}

// Gradients of the modulations of a group, from its sums.
template <class T>
struct ModulationGradients {
    Vector<T> weight, bias, dscale, dshift, dgate;

    ModulationGradients(const LayerBackward& p, int64_t batch, int64_t group)
        : weight(p.weight),
          bias(p.bias),
          dscale(p.dscale, batch, group),
          dshift(p.dshift, batch, group),
          dgate(p.dgate, batch, group) {}

    template <class Extent>
    FASTVIDEO_INLINE void set(int64_t d, Floats grad_normed, Floats grad, Floats grad_y,
                              Extent extent) const {
        dscale.set(d, grad_normed * weight.at(d, extent, 1) + grad * bias.at(d, extent, 0), extent);
        dshift.set(d, grad, extent);
        dgate.set(d, grad_y, extent);
    }
};

bool has_modulation(const LayerBackward& p) {
    return p.dscale.data || p.dshift.data || p.dgate.data;
}
bool has_affine(const LayerBackward& p) { return p.dweight.data || p.dbias.data; }

// The sums over a segment's tokens, added to by each of them.
struct SegmentSums {
    float *grad_normed, *grad, *grad_y;
};

template <class T>
void backward_token(const LayerBackward& p, int64_t batch, int64_t token, int64_t next,
                    const float* factor, const float* gate, const SegmentSums& sums) {
    const T *grad = row_of<T>(p.grad, batch, token), *x = row_of<T>(p.x, batch, token);
    const float mean = p.mean[batch * p.tokens + token], rstd = p.rstd[batch * p.tokens + token];
    Sum of_grad, of_grad_normed;
    for_channels(p.dim, [&](int64_t d, int chain, auto extent) FASTVIDEO_INLINE {
        const Floats g = load(grad + d, extent), normed = (load(x + d, extent) - mean) * rstd;
        const Floats scaled = g * load(factor + d);
        of_grad.chain[chain] += scaled;
        of_grad_normed.chain[chain] += scaled * normed;
        store(sums.grad_normed + d, load(sums.grad_normed + d) + g * normed);
        store(sums.grad + d, load(sums.grad + d) + g);
    });
    // dx = rstd * (scaled - mean(scaled) - normed * mean(scaled * normed))
    const float mean_grad = of_grad.total() / p.dim * rstd;
    const float mean_grad_normed = of_grad_normed.total() / p.dim * rstd;
    const T *next_grad = row_of<T>(p.grad, batch, next), *next_x = row_of<T>(p.x, batch, next);
    T* dx = row_of<T>(p.dx, batch, token);
    const auto dx_at = [&](int64_t d, auto extent) FASTVIDEO_INLINE {
        prefetch(next_grad, d);
        prefetch(next_x, d);
        const Floats normed = (load(x + d, extent) - mean) * rstd;
        return load(grad + d, extent) * (load(factor + d) * rstd) - mean_grad -
               normed * mean_grad_normed;
    };
    if (!p.grad_sum.data) {
        for_channels(p.dim, [&](int64_t d, int, auto extent)
                                FASTVIDEO_INLINE { store(dx + d, dx_at(d, extent), extent); });
        return;
    }
    const T* grad_sum = row_of<T>(p.grad_sum, batch, token);
    if (!p.dgate.data) {
        for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
            store(dx + d, dx_at(d, extent) + load(grad_sum + d, extent), extent);
        });
        return;
    }
    const T* y = row_of<T>(p.y, batch, token);
    T* dy = row_of<T>(p.dy, batch, token);
    for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
        const Floats g = dx_at(d, extent) + load(grad_sum + d, extent);
        store(dx + d, g, extent);
        store(dy + d, g * load(gate + d), extent);
        store(sums.grad_y + d, load(sums.grad_y + d) + g * load(y + d, extent));
    });
}

template <class T>
void backward(const LayerBackward& p, const Split& split, int64_t first_task, int64_t last_task) {
    Scratch scratch(5, p.dim);
    float *factor = scratch[0], *gate = scratch[1];
    const SegmentSums sums{scratch[2], scratch[3], scratch[4]};
    for (int64_t task = first_task; task < last_task; ++task) {
        float* dweight = p.task_sums + 2 * task * p.dim;
        float* dbias = dweight + p.dim;
        if (has_affine(p)) std::fill(dweight, dbias + p.dim, 0.0f);
        for_segments(p, split, task, [&](const Segment& at) {
            const Vector<T> weight(p.weight), scale(p.scale, at.batch, at.group);
            for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                store(factor + d, weight.at(d, extent, 1) * (1 + scale.at(d, extent, 0)));
                for (float* sum : {sums.grad_normed, sums.grad, sums.grad_y})
                    store(sum + d, Floats{});
            });
            if (p.dgate.data) widen<T>(p.gate, at.batch, at.group, p.dim, gate);
            for (int64_t token = at.first; token < at.last; ++token)
                backward_token<T>(p, at.batch, token, std::min(token + 1, at.last - 1), factor,
                                  gate, sums);
            const ModulationGradients<T> gradients(p, at.batch, at.group);
            float* piece = p.piece_sums + 3 * (at.index * split.pieces + at.piece) * p.dim;
            for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                const Floats grad_normed = load(sums.grad_normed + d), grad = load(sums.grad + d);
                const Floats grad_y = load(sums.grad_y + d);
                if (has_modulation(p) && split.pieces > 1) {
                    store(piece + d, grad_normed, extent);
                    store(piece + p.dim + d, grad, extent);
                    store(piece + 2 * p.dim + d, grad_y, extent);
                } else {
                    gradients.set(d, grad_normed, grad, grad_y, extent);
                }
                if (has_affine(p)) {
                    const Floats scaling = 1 + scale.at(d, extent, 0);
                    store(dweight + d, load(dweight + d, extent) + grad_normed * scaling, extent);
                    store(dbias + d, load(dbias + d, extent) + grad * scaling, extent);
                }
            });
        });
    }
}

// Adds what the tasks left, always in the same order; for channels from `first` to `last`.
template <class T>
void backward_sums(const LayerBackward& p, const Split& split, int64_t first, int64_t last) {
    if (has_modulation(p) && split.pieces > 1) {
        for (int64_t index = 0; index < split.groups; ++index) {
            const ModulationGradients<T> gradients(p, index / p.groups, index % p.groups);
            for_channels(last - first, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                const float* sums = p.piece_sums + 3 * index * split.pieces * p.dim + first + d;
                Floats grad_normed{}, grad{}, grad_y{};
                for (int64_t piece = 0; piece < split.pieces; ++piece, sums += 3 * p.dim) {
                    grad_normed += load(sums, extent);
                    grad += load(sums + p.dim, extent);
                    grad_y += load(sums + 2 * p.dim, extent);
                }
                gradients.set(first + d, grad_normed, grad, grad_y, extent);
            });
        }
    }
    if (!has_affine(p)) return;
    const Vector<T> dweight(p.dweight), dbias(p.dbias);
    for_channels(last - first, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
        const float* sums = p.task_sums + first + d;
        Floats weight{}, bias{};
        for (int64_t task = 0; task < split.tasks; ++task, sums += 2 * p.dim) {
            weight += load(sums, extent);
            bias += load(sums + p.dim, extent);
        }
        dweight.set(first + d, weight, extent);
        dbias.set(first + d, bias, extent);
    });
}

template <class T>
void gate_forward(const GateForward& p, int64_t first_row, int64_t last_row) {
    Scratch scratch(1, p.dim);
    const int64_t group_rows = p.tokens / p.groups;
    int64_t widened = -1;
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t batch = row / p.tokens, token = row % p.tokens, group = token / group_rows;
        if (widened != batch * p.groups + group) {
            widened = batch * p.groups + group;
            widen<T>(p.gate, batch, group, p.dim, scratch[0]);
        }
        add_gated(row_of<T>(p.x, batch, token), row_of<T>(p.y, batch, token), scratch[0], p.dim,
                  row_of<T>(p.out, batch, token));
    }
}

template <class T>
void gate_backward(const GateBackward& p, const Split& split, int64_t first_task,
                   int64_t last_task) {
    Scratch scratch(2, p.dim);
    float *gate = scratch[0], *sums = scratch[1];
    for (int64_t task = first_task; task < last_task; ++task) {
        for_segments(p, split, task, [&](const Segment& at) {
            widen<T>(p.gate, at.batch, at.group, p.dim, gate);
            std::fill(sums, sums + p.dim, 0.0f);
            for (int64_t token = at.first; token < at.last; ++token) {
                const T* grad = row_of<T>(p.grad, at.batch, token);
                const T* y = row_of<T>(p.y, at.batch, token);
                T* dy = row_of<T>(p.dy, at.batch, token);
                for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                    const Floats g = load(grad + d, extent);
                    store(dy + d, g * load(gate + d), extent);
                    store(sums + d, load(sums + d) + g * load(y + d, extent));
                });
            }
            const Vector<T> dgate(p.dgate, at.batch, at.group);
            float* piece = p.piece_sums + (at.index * split.pieces + at.piece) * p.dim;
            for_channels(p.dim, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
                if (split.pieces > 1)
                    store(piece + d, load(sums + d), extent);
                else
                    dgate.set(d, load(sums + d), extent);
            });
        });
    }
}

template <class T>
void gate_backward_sums(const GateBackward& p, const Split& split, int64_t first, int64_t last) {
    if (split.pieces == 1) return;
    for (int64_t index = 0; index < split.groups; ++index) {
        const Vector<T> dgate(p.dgate, index / p.groups, index % p.groups);
        for_channels(last - first, [&](int64_t d, int, auto extent) FASTVIDEO_INLINE {
            const float* sums = p.piece_sums + index * split.pieces * p.dim + first + d;
            Floats total{};
            for (int64_t piece = 0; piece < split.pieces; ++piece, sums += p.dim)
                total += load(sums, extent);
            dgate.set(first + d, total, extent);
        });
    }
}

template <class T>
constexpr LayerKernels kernels_of() {
    return {forward<T>,      backward<T>,      backward_sums<T>,
            gate_forward<T>, gate_backward<T>, gate_backward_sums<T>};
}

}  // namespace

const ByDtype<LayerKernels>& layer_kernels() {
    static constexpr ByDtype<LayerKernels> kernels{kernels_of<float>(), kernels_of<BFloat16>(),
                                                   kernels_of<Float16>()};
    return kernels;
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
