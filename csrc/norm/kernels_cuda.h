// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of the norms are given: pointers, sizes and strides, and who calls them.
//
// Axes: B batch, S tokens, D channels, G runs of tokens that share a modulation, H heads.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda/launch.h"

namespace fastvideo::cuda::norm {

// The widest row: 512 threads with 32 channels each.
inline constexpr int kMaxWidth = 16384;

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

// The rows of a kernel, in `groups` equal runs in each of `batch` samples. All of their memory, and
// that of vectors, is in runs of eight channels at multiples of 16 bytes.
struct Grid {
    int batch = 1, groups = 1, group_rows = 1;
    int heads = 1;     // rows that a token is
    int channels = 1;  // of a row, or of all heads in it
    int width = 1;     // the same, rounded up to a multiple of eight: zeros follow the channels
    Dtype dtype = Dtype::kFloat;

    // Set by the launch: a block walks through one of the `chunks` parts of a group.
    int chunks = 1, chunk_rows = 1;
    int stages = 1;  // rows that are on the way into shared memory, or there

    constexpr int64_t num_groups() const { return static_cast<int64_t>(batch) * groups; }
    constexpr int64_t num_chunks() const { return num_groups() * chunks; }
};

// Of tokens x; of the sum x + y * gate; the sum without a norm.
enum class ForwardMode { kLayer, kSumLayer, kSum };

// out = (norm(x or sum) * weight + bias) * (1 + scale) + shift.
struct LayerForward : Grid {
    ForwardMode mode = ForwardMode::kLayer;
    Rows x, y, sum, out;
    Vectors gate, weight, bias, scale, shift;
    float* mean = nullptr;  // (B,S)
    float* rstd = nullptr;
    float eps = 0;
};

// Of tokens; of a sum, to whose gradient grad_sum is added; of a sum of something + y * gate; of
// that sum without a norm, where grad is its gradient.
enum class BackwardMode { kLayer, kSumLayer, kGatedLayer, kGate };

struct LayerBackward : Grid {
    BackwardMode mode = BackwardMode::kLayer;
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

// (S,D/2) of one angle for each pair of channels.
struct Angles {
    const float* data = nullptr;  // null: no rotation
    int64_t token = 0, pair = 0;
};

// A norm of each row, or of each of the heads of `head_dim` channels in a row.
struct Rms : Grid {
    int head_dim = 1;
    bool heads_in_row = false;
    Rows x;
    Vectors weight;  // the channels of what is normalised
    Angles cos, sin;
    bool aligned_angles = false;  // whether those of four pairs can be accessed at once
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

// ---- gradients of vectors ---------------------------------------------------------------------

// The sums over chunks, where the kernel that has the rows in hand lacks registers for them.
void sum_columns(const LayerBackward& arguments, Stream stream);
// dscale = weight * normed + bias * grad, dshift = grad, dgate = gate, summed over each group.
void sum_groups(const LayerBackward& arguments, Stream stream);
// dweight = (1 + scale) * normed, dbias = (1 + scale) * grad, summed over everything.
void sum_weights(const LayerBackward& arguments, Stream stream);

}  // namespace fastvideo::cuda::norm
