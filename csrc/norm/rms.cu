// SPDX-License-Identifier: Apache-2.0
// RMSNorm of heads, or of all heads of a token together, with weight and rotary positions.
//
// A row is a token, so that its weights stay where they are for all rows. Heads whose vectors of
// eight channels divide a warp are normalised side by side in it; others are rows of their own.

#include "norm/norm.cuh"

namespace fastvideo::cuda::norm {

namespace {

// Cosine and sine of four pairs of channels.
struct Turn {
    float cos[kEight / 2], sin[kEight / 2];
};

__device__ __forceinline__ Turn load_turn(const Rms& p, int token, int channel) {
    const float* const cos = p.cos.data + token * p.cos.token;
    const float* const sin = p.sin.data + token * p.sin.token;
    if (p.aligned_angles) {
        const int pair = channel % p.head_dim / 2;
        const float4 c = load<float4>(cos + pair), s = load<float4>(sin + pair);
        return {{c.x, c.y, c.z, c.w}, {s.x, s.y, s.z, s.w}};
    }
    Turn turn = {};
#pragma unroll
    for (int i = 0; i < kEight / 2; ++i) {
        if (channel + 2 * i >= p.channels) continue;
        const int pair = (channel + 2 * i) % p.head_dim / 2;
        turn.cos[i] = cos[pair * p.cos.pair];
        turn.sin[i] = sin[pair * p.sin.pair];
    }
    return turn;
}

// Turns pairs of channels, or back.
template <bool kBack>
__device__ __forceinline__ void rotate(Float8& x, const Turn& turn) {
#pragma unroll
    for (int pair = 0; pair < kEight / 2; ++pair) {
        const float even = x.at[2 * pair], odd = x.at[2 * pair + 1];
        const float cos = turn.cos[pair], sin = kBack ? -turn.sin[pair] : turn.sin[pair];
        x.at[2 * pair] = even * cos - odd * sin;
        x.at[2 * pair + 1] = odd * cos + even * sin;
    }
}

// Sums over each head, of which every vector of the thread is a part, or over the row.
template <bool kHeads, int kVectors>
__device__ __forceinline__ void sum_norms(float (&sums)[kVectors], int head_dim,
                                          BlockSum& block_sum) {
    if constexpr (kHeads) {
        for (int flip = head_dim / kEight / 2; flip > 0; flip /= 2)
#pragma unroll
            for (int i = 0; i < kVectors; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], flip);
    } else {
        float total[] = {0.0f};
#pragma unroll
        for (int i = 0; i < kVectors; ++i) total[0] += sums[i];
        block_sum(total);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) sums[i] = total[0];
    }
}

// Which of all norms the thread's channels are in.
template <bool kHeads>
__device__ __forceinline__ int64_t norm_index(const Rms& p, int sample, int row, int channel) {
    const int64_t of_all = static_cast<int64_t>(sample) * p.group_rows + row;
    return kHeads ? of_all * (p.width / p.head_dim) + channel / p.head_dim : of_all;
}

__host__ __device__ __forceinline__ int weight_width(const Rms& p) {
    return p.heads_in_row ? p.head_dim : p.width;
}

// The weight has the channels of a head, or of the row.
template <bool kHeads>
__device__ __forceinline__ int weight_channel(const Rms& p, int channel) {
    return kHeads ? channel % p.head_dim : channel;
}

template <class T, int kVectors, bool kHeads>
__global__ void __launch_bounds__(kMaxThreads<kVectors>)
    rms_forward_kernel(const __grid_constant__ RmsForward p) {
    const Chunk chunk(p);
    const Columns columns{p.width};
    Inputs<T, kVectors, 1> inputs(p, chunk, dynamic_shared() + BlockSum::kSharedBytes, p.x);
    BlockSum block_sum(dynamic_shared());
    const auto weight = keep<kVectors>(columns, [&](int i) {
        return load_vector<T>(p.weight, weight_channel<kHeads>(p, columns.first(i)), 1.0f);
    });
    const int norm_channels = kHeads ? p.head_dim : p.channels;

    T* const outs = sample_of<T>(p.out, chunk.sample);
    for (int r = 0; r < chunk.rows; ++r) {
        const int row = chunk.first + r;
        const auto turn = keep<kVectors>(columns, [&](int i) {
            return p.cos.data ? load_turn(p, row / p.heads, columns.first(i)) : Turn{};
        });
        inputs.advance(r);
        Float8 x[kVectors] = {};
        float squares[kVectors] = {};
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!columns.has(i)) continue;
            x[i] = inputs.get(0, i);
#pragma unroll
            for (int e = 0; e < kEight; ++e) squares[i] += x[i].at[e] * x[i].at[e];
        }
        sum_norms<kHeads>(squares, p.head_dim, block_sum);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!columns.has(i)) continue;
            const int channel = columns.first(i);
            const float rstd = rsqrt_approx(squares[i] / norm_channels + p.eps);
            const Float8 by = weight[i];
#pragma unroll
            for (int e = 0; e < kEight; ++e) x[i].at[e] *= rstd * by.at[e];
            if (p.cos.data) rotate<false>(x[i], turn[i]);
            store_eight(outs + row_offset(p.out, row, p.heads) + channel, x[i]);
            if (channel % (kHeads ? p.head_dim : p.width) == 0)
                p.rstd[norm_index<kHeads>(p, chunk.sample, row, channel)] = rstd;
        }
    }
}

template <class T, int kVectors, bool kHeads>
__global__ void __launch_bounds__(kMaxThreads<kVectors>)
    rms_backward_kernel(const __grid_constant__ RmsBackward p) {
    const Chunk chunk(p);
    const Columns columns{p.width};
    unsigned char* const stages = dynamic_shared() + BlockSum::kSharedBytes;
    Inputs<T, kVectors, 2> inputs(p, chunk, stages, p.grad, p.x);
    BlockSum block_sum(dynamic_shared());
    const auto weight = keep<kVectors>(columns, [&](int i) {
        return load_vector<T>(p.weight, weight_channel<kHeads>(p, columns.first(i)), 1.0f);
    });
    const int norm_channels = kHeads ? p.head_dim : p.channels;

    Float8 weight_sum[kVectors] = {};
    T* const dxs = sample_of<T>(p.dx, chunk.sample);
    for (int r = 0; r < chunk.rows; ++r) {
        const int row = chunk.first + r;
        float rstd[kVectors] = {};
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (columns.has(i))
                rstd[i] = p.rstd[norm_index<kHeads>(p, chunk.sample, row, columns.first(i))];
        const auto turn = keep<kVectors>(columns, [&](int i) {
            return p.cos.data ? load_turn(p, row / p.heads, columns.first(i)) : Turn{};
        });
        inputs.advance(r);
        auto grad_before_rotation = [&](int i) {
            Float8 grad = inputs.get(0, i);
            if (p.cos.data) rotate<true>(grad, turn[i]);
            return grad;
        };
        float means[kVectors] = {};  // of grad * weight * normed
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!columns.has(i)) continue;
            const Float8 grad = grad_before_rotation(i), x = inputs.get(1, i), by = weight[i];
#pragma unroll
            for (int e = 0; e < kEight; ++e)
                means[i] += grad.at[e] * by.at[e] * (x.at[e] * rstd[i]);
        }
        sum_norms<kHeads>(means, p.head_dim, block_sum);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            if (!columns.has(i)) continue;
            Float8 grad = grad_before_rotation(i);
            const Float8 x = inputs.get(1, i), by = weight[i];
            const float mean = means[i] / norm_channels;
#pragma unroll
            for (int e = 0; e < kEight; ++e) {
                const float normed = x.at[e] * rstd[i];
                weight_sum[i].at[e] += grad.at[e] * normed;
                grad.at[e] = rstd[i] * (grad.at[e] * by.at[e] - normed * mean);
            }
            store_eight(dxs + row_offset(p.dx, row, p.heads) + columns.first(i), grad);
        }
    }

    if (!p.weight_sums) return;
    float* const sums = p.weight_sums + static_cast<int64_t>(chunk.index) * weight_width(p);
    if constexpr (kHeads) {
        float* const of_heads = reinterpret_cast<float*>(stages);
        __syncthreads();  // all are done with the rows that were there
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (columns.has(i)) store_sums(of_heads + columns.first(i), weight_sum[i]);
        __syncthreads();
        for (int d = static_cast<int>(threadIdx.x); d < p.head_dim;
             d += static_cast<int>(blockDim.x)) {
            float sum = 0.0f;
            for (int channel = d; channel < p.width; channel += p.head_dim)
                sum += of_heads[channel];
            sums[d] = sum;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (columns.has(i)) store_sums(sums + columns.first(i), weight_sum[i]);
    }
}

}  // namespace

void rms_forward(RmsForward p, Stream stream) {
    with_variant(p, [&]<class V>(V variant) {
        const auto kernel = p.heads_in_row ? rms_forward_kernel<typename V::T, V::kVectors, true>
                                           : rms_forward_kernel<typename V::T, V::kVectors, false>;
        const Shape shape = plan(p, variant, 1, kernel, 1);
        launch_chunks(kernel, p, shape, stream);
    });
}

void rms_backward(RmsBackward p, const Allocate& allocate, Stream stream) {
    with_variant(p, [&]<class V>(V variant) {
        const auto kernel = p.heads_in_row ? rms_backward_kernel<typename V::T, V::kVectors, true>
                                           : rms_backward_kernel<typename V::T, V::kVectors, false>;
        Shape shape = plan(p, variant, 2, kernel, 4);
        // Where the sums of all heads are added up.
        shape.shared_bytes =
            std::max(shape.shared_bytes, BlockSum::kSharedBytes + p.width * sizeof(float));
        if (p.dweight.data) p.weight_sums = allocate(p.num_chunks() * weight_width(p));
        launch_chunks(kernel, p, shape, stream);
    });
    LayerBackward sums;
    static_cast<Grid&>(sums) = p;
    sums.width = weight_width(p);
    sums.channels = p.heads_in_row ? p.head_dim : p.channels;
    sums.dweight = p.dweight;
    sums.normed_sums = p.weight_sums;
    sum_weights(sums, stream);
}

}  // namespace fastvideo::cuda::norm
