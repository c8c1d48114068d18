// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of the norms are given: pointers, sizes and strides, without torch.
//
// Axes: B batch, S tokens, D channels, G runs of tokens that share a modulation, H heads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa.h"

namespace fastvideo::cpu {

// Tokens or heads with dense channels, of the dtype a kernel is compiled for; strides in elements.
struct Rows {
    void* data = nullptr;
    int64_t batch = 0, token = 0, head = 0;
};

// (D,) or (B,G,D) vectors with dense channels, float32 or of the dtype of x; data null: not given.
struct Vectors {
    void* data = nullptr;
    bool is_float = false;
    int64_t batch = 0, group = 0;
};

// How the sums over tokens in a backward are cut, by sizes alone: the result is the same bit for
// bit whatever the number of threads. A task is a piece of a group, or several groups as a whole.
struct Split {
    int64_t groups, group_rows;  // of the whole batch
    int64_t pieces, piece_rows;  // of a group
    int64_t groups_per_task, tasks;

    Split(int64_t groups, int64_t group_rows) : groups(groups), group_rows(group_rows) {
        // Enough tasks for many cores, enough rows for the sums of a task to be worth writing.
        const int64_t rows = std::clamp<int64_t>(groups * group_rows / 128, 16, 256);
        pieces = std::max<int64_t>(1, (group_rows + rows - 1) / rows);
        piece_rows = (group_rows + pieces - 1) / pieces;
        groups_per_task =
            pieces > 1 ? 1 : std::max<int64_t>(1, rows / std::max<int64_t>(1, group_rows));
        tasks = (groups + groups_per_task - 1) / groups_per_task * pieces;
    }
};

// G groups of S / G consecutive tokens in each of B samples.
struct Tokens {
    int64_t batch, tokens, dim, groups;
    int64_t rows() const { return batch * tokens; }
};

// With y: x is the residual and what is normalised is sum = x + y * gate.
struct LayerForward : Tokens {
    Rows x, y, sum, out;
    Vectors gate, weight, bias, scale, shift;
    float* mean;  // (B,S)
    float* rstd;
    float eps;
};

// With y: x is the sum, grad_sum its gradient from elsewhere. Gradients of vectors whose data is
// null are not computed.
struct LayerBackward : Tokens {
    Rows grad, grad_sum, x, y;
    const float* mean;
    const float* rstd;
    Vectors gate, weight, bias, scale, shift;
    Rows dx, dy;
    Vectors dgate, dweight, dbias, dscale, dshift;
    float* piece_sums;  // (groups * pieces, 3, D): of grad * normed, grad, grad of the sum * y
    float* task_sums;   // (tasks, 2, D): of the gradients of weight and bias
};

// out = x + y * gate.
struct GateForward : Tokens {
    Rows x, y, out;
    Vectors gate;
};

struct GateBackward : Tokens {
    Rows grad, y, dy;
    Vectors gate, dgate;
    float* piece_sums;  // (groups * pieces, D)
};

// cos and sin of each pair of channels; data null: no rotation.
struct Rotary {
    const float* cos = nullptr;
    const float* sin = nullptr;
    int64_t cos_token, cos_pair, sin_token, sin_pair;
};

struct Rms {
    int64_t batch, tokens, heads, dim;
    bool across_heads;
    Rows x;
    Vectors weight;  // (H*D,) if across_heads, otherwise (D,)
    Rotary rotary;
};

struct RmsForward : Rms {
    Rows out;
    float* rstd;  // (B,S,1) if across_heads, otherwise (B,S,H)
    float eps;
};

struct RmsBackward : Rms {
    Rows grad, dx;
    const float* rstd;
    Vectors dweight;
    float* task_sums;  // (tasks, channels of weight)
};

// Functions for one dtype; `first` and `last` bound rows, tasks or channels.
struct LayerKernels {
    void (*forward)(const LayerForward&, int64_t first_row, int64_t last_row);
    void (*backward)(const LayerBackward&, const Split&, int64_t first_task, int64_t last_task);
    void (*backward_sums)(const LayerBackward&, const Split&, int64_t first, int64_t last);
    void (*gate_forward)(const GateForward&, int64_t first_row, int64_t last_row);
    void (*gate_backward)(const GateBackward&, const Split&, int64_t first_task, int64_t last_task);
    void (*gate_backward_sums)(const GateBackward&, const Split&, int64_t first, int64_t last);
};

struct RmsKernels {
    void (*forward)(const RmsForward&, int64_t first_token, int64_t last_token);
    void (*backward)(const RmsBackward&, const Split&, int64_t first_task, int64_t last_task);
    void (*backward_sums)(const RmsBackward&, const Split&, int64_t first, int64_t last);
};

template <class Kernels>
struct ByDtype {
    Kernels float32, bfloat16, float16;
};

}  // namespace fastvideo::cpu

FASTVIDEO_DECLARE_KERNELS(ByDtype<LayerKernels>, layer_kernels)
FASTVIDEO_DECLARE_KERNELS(ByDtype<RmsKernels>, rms_kernels)
