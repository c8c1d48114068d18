// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the norms are given: pointers, sizes and strides, and who calls them.
//
// Axes: B batch, S tokens, D channels, G runs of tokens that share a modulation, H heads.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda/launch.h"

namespace fastvideo::cuda::norm {

// Tokens or heads with dense channels; strides in elements.
struct Rows {
    void* data = nullptr;
    int64_t batch = 0, token = 0, head = 0;
};

// (D,) or (B,G,D) vectors with dense channels, float32 or of the dtype of the rows.
struct Vectors {
    void* data = nullptr;  // null: not given
    bool is_float = false;
    int64_t batch = 0, group = 0;
};

enum class Dtype { kFloat, kBFloat16, kFloat16 };

// The rows of a kernel: `width` channels each, in `groups` equal runs in each of `batch` samples.
struct Grid {
    int batch = 1, groups = 1, group_rows = 1;
    int heads = 1;  // rows that a token is; each is normalised by itself
    int width = 1;
    Dtype dtype = Dtype::kFloat;
    bool aligned = false;  // whether all channels can be accessed in vectors of eight

    // Set by the launch: a block walks through one of the `chunks` parts of a group.
    int chunks = 1, chunk_rows = 1;
    int stages = 1;  // rows that are on the way into shared memory, or there

    int64_t num_groups() const { return static_cast<int64_t>(batch) * groups; }
    int64_t num_chunks() const { return num_groups() * chunks; }
};

// out = (norm(x) * weight + bias) * (1 + scale) + shift. With y: `sum` = x + y * gate takes the
// place of x. Without out: the sum only.
struct LayerForward : Grid {
    Rows x, y, sum, out;
    Vectors gate, weight, bias, scale, shift;
    float* mean = nullptr;  // (B,S)
    float* rstd = nullptr;
    float eps = 0;
};

// With y: x is the sum, grad_sum its gradient from elsewhere. Without x: grad is that of the sum.
struct LayerBackward : Grid {
    Rows grad, grad_sum, x, y;
    const float* mean = nullptr;
    const float* rstd = nullptr;
    Vectors gate, weight, bias, scale;
    Rows dx, dy;
    Vectors dgate, dweight, dbias, dscale, dshift;

    // Sums over the rows of each chunk, float32 (chunks, D): of grad * normed, of grad, and of the
    // gradient of the sum times y. All gradients of vectors are made of them.
    float* normed_sums = nullptr;
    float* grad_sums = nullptr;
    float* gate_sums = nullptr;
};

// Rows of one head each (weight (D,)), or of all heads together (weight (H*D,)); `head_dim` is D.
struct Rms : Grid {
    int head_dim = 1;
    bool heads_in_row = false;  // each head of a row is normalised by itself
    Rows x;
    Vectors weight;
    const float* cos = nullptr;  // (S,D/2); null: no rotation
    const float* sin = nullptr;
};

struct RmsForward : Rms {
    Rows out;
    float* rstd = nullptr;  // one for each norm
    float eps = 0;
};

struct RmsBackward : Rms {
    Rows grad, dx;
    const float* rstd = nullptr;
    Vectors dweight;
    float* weight_sums = nullptr;  // (chunks, channels of weight)
};

// Gives `floats` of scratch memory that lives until the kernels have run.
using Allocate = std::function<float*(int64_t floats)>;

void layer_forward(LayerForward arguments, Stream stream);
void layer_backward(LayerBackward arguments, const Allocate& allocate, Stream stream);
void rms_forward(RmsForward arguments, Stream stream);
void rms_backward(RmsBackward arguments, const Allocate& allocate, Stream stream);

// ---- from sums over chunks to gradients of vectors ----------------------------------------------

// dscale = weight * normed + bias * grad, dshift = grad, dgate = gate, summed over each group.
void sum_groups(const LayerBackward& arguments, Stream stream);
// dweight = (1 + scale) * normed, dbias = (1 + scale) * grad, summed over everything.
void sum_weights(const LayerBackward& arguments, Stream stream);

}  // namespace fastvideo::cuda::norm
