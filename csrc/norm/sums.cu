// SPDX-License-Identifier: Apache-2.0
// Gradients of vectors over channels from the sums over chunks of rows, in an order that is fixed.
//
// The chunks of a column are shared out to the threads of one warp or more along y.

#include "norm/norm.cuh"

namespace fastvideo::cuda::norm {

namespace {

__device__ __forceinline__ float read(const Vectors& vectors, Dtype dtype, int64_t at,
                                      float otherwise) {
    if (!vectors.data) return otherwise;
    if (vectors.is_float) return static_cast<const float*>(vectors.data)[at];
    return dtype == Dtype::kBFloat16 ? to_float(static_cast<const BFloat16*>(vectors.data)[at])
                                     : to_float(static_cast<const Float16*>(vectors.data)[at]);
}

__device__ __forceinline__ void write(const Vectors& vectors, Dtype dtype, int64_t at,
                                      float value) {
    if (vectors.is_float)
        static_cast<float*>(vectors.data)[at] = value;
    else if (dtype == Dtype::kBFloat16)
        static_cast<BFloat16*>(vectors.data)[at] = from_float<BFloat16>(value);
    else
        static_cast<Float16*>(vectors.data)[at] = from_float<Float16>(value);
}

// The sum over threads along y, for those with y = 0.
__device__ __forceinline__ float sum_along_y(float value) {
    float* const place = reinterpret_cast<float*>(dynamic_shared());
    place[threadIdx.y * blockDim.x + threadIdx.x] = value;
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.y == 0)
        for (unsigned y = 0; y < blockDim.y; ++y) sum += place[y * blockDim.x + threadIdx.x];
    __syncthreads();
    return sum;
}

constexpr int kColumnThreads = 128;

// Sums over the rows of a chunk, a part of the columns for each block.
template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    sum_columns_kernel(const __grid_constant__ LayerBackward p) {
    const Chunk chunk(p);
    const int column = static_cast<int>(blockIdx.y * kColumnThreads + threadIdx.x) * kEight;
    if (column >= p.width) return;
    auto row_of = [&](const Rows& rows, int token) {
        return load_eight(sample_of<const T>(rows, chunk.sample) + token * rows.token + column);
    };
    Float8 normed_sum = filled(0.0f), grad_sum = filled(0.0f), gate_sum = filled(0.0f);
    for (int row = 0; row < chunk.rows; ++row) {
        const int token = chunk.first + row;
        if (p.normed_sums || p.grad_sums) {
            const int64_t at = static_cast<int64_t>(chunk.sample) * p.groups * p.group_rows + token;
            const float mean = p.mean[at], rstd = p.rstd[at];
            const Float8 grad = row_of(p.grad, token), x = row_of(p.x, token);
#pragma unroll
            for (int e = 0; e < kEight; ++e) {
                normed_sum.at[e] += grad.at[e] * ((x.at[e] - mean) * rstd);
                grad_sum.at[e] += grad.at[e];
            }
        }
        if (p.gate_sums) {
            const Float8 grad = row_of(p.mode == BackwardMode::kGate ? p.grad : p.dx, token),
                         y = row_of(p.y, token);
#pragma unroll
            for (int e = 0; e < kEight; ++e) gate_sum.at[e] += grad.at[e] * y.at[e];
        }
    }
    const int64_t at = static_cast<int64_t>(chunk.index) * p.width + column;
    if (p.normed_sums) store_sums(p.normed_sums + at, normed_sum);
    if (p.grad_sums) store_sums(p.grad_sums + at, grad_sum);
    if (p.gate_sums) store_sums(p.gate_sums + at, gate_sum);
}

__global__ void sum_groups_kernel(const __grid_constant__ LayerBackward p) {
    const int blocks =
        (p.channels + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
    const int of_all = static_cast<int>(blockIdx.x) / blocks;
    const int column = static_cast<int>(blockIdx.x) % blocks * static_cast<int>(blockDim.x) +
                       static_cast<int>(threadIdx.x);
    const int sample = of_all / p.groups, group = of_all % p.groups;
    const bool inside = column < p.channels;

    auto sum_over_chunks = [&](const float* sums) {
        float sum = 0.0f;
        if (inside && sums) {
            const float* from = sums + static_cast<int64_t>(of_all) * p.chunks * p.width + column;
#pragma unroll 4
            for (int chunk = static_cast<int>(threadIdx.y); chunk < p.chunks;
                 chunk += static_cast<int>(blockDim.y))
                sum += from[static_cast<int64_t>(chunk) * p.width];
        }
        return sum_along_y(sum);
    };
    const float normed = sum_over_chunks(p.normed_sums), grad = sum_over_chunks(p.grad_sums);
    const float gate = sum_over_chunks(p.gate_sums);
    if (!inside || threadIdx.y != 0) return;

    auto put = [&](const Vectors& gradient, const float* sums, float value) {
        if (!gradient.data || gradient.data == sums) return;
        write(gradient, p.dtype, sample * gradient.batch + group * gradient.group + column, value);
    };
    put(p.dscale, p.normed_sums,
        read(p.weight, p.dtype, column, 1.0f) * normed +
            read(p.bias, p.dtype, column, 0.0f) * grad);
    put(p.dshift, p.grad_sums, grad);
    put(p.dgate, p.gate_sums, gate);
}

__global__ void sum_weights_kernel(const __grid_constant__ LayerBackward p) {
    const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const bool inside = column < p.channels;
    float normed = 0.0f, grad = 0.0f;
    if (inside) {
        const int64_t num_chunks = p.num_chunks();
#pragma unroll 4
        for (int64_t chunk = threadIdx.y; chunk < num_chunks; chunk += blockDim.y) {
            const int of_all = static_cast<int>(chunk / p.chunks);
            const int64_t of_group =
                of_all / p.groups * p.scale.batch + of_all % p.groups * p.scale.group;
            const float factor = 1.0f + read(p.scale, p.dtype, of_group + column, 0.0f);
            normed += factor * p.normed_sums[chunk * p.width + column];
            if (p.grad_sums) grad += factor * p.grad_sums[chunk * p.width + column];
        }
    }
    normed = sum_along_y(normed);
    grad = sum_along_y(grad);
    if (!inside || threadIdx.y != 0) return;
    if (p.dweight.data) write(p.dweight, p.dtype, column, normed);
    if (p.dbias.data) write(p.dbias, p.dtype, column, grad);
}

// Threads for sums of `parts` numbers.
dim3 block_for(int64_t parts) {
    const unsigned y = parts >= 32 ? 32 : parts >= 8 ? 8 : 1;
    return dim3(std::max(32u, 256 / y), y);
}

}  // namespace

void sum_columns(const LayerBackward& arguments, Stream stream) {
    if (arguments.num_chunks() == 0) return;
    constexpr int kWidth = kColumnThreads * kEight;
    const dim3 grid(static_cast<unsigned>(arguments.num_chunks()),
                    static_cast<unsigned>((arguments.width + kWidth - 1) / kWidth));
    with_variant(arguments, [&]<class V>(V) {
        launch(sum_columns_kernel<typename V::T>, grid, dim3(kColumnThreads), 0, stream, arguments);
    });
}

void sum_groups(const LayerBackward& arguments, Stream stream) {
    auto missing = [](const Vectors& gradient, const float* sums) {
        return gradient.data && gradient.data != sums;
    };
    if (!missing(arguments.dscale, arguments.normed_sums) &&
        !missing(arguments.dshift, arguments.grad_sums) &&
        !missing(arguments.dgate, arguments.gate_sums))
        return;
    const dim3 block = block_for(arguments.chunks);
    const int64_t blocks = arguments.num_groups() * ((arguments.channels + block.x - 1) / block.x);
    STD_TORCH_CHECK(blocks <= INT32_MAX, "norm: ", blocks, " blocks, expected at most ", INT32_MAX);
    if (blocks == 0) return;
    launch(sum_groups_kernel, dim3(static_cast<unsigned>(blocks)), block,
           block.x * block.y * sizeof(float), stream, arguments);
}

void sum_weights(const LayerBackward& arguments, Stream stream) {
    if (!arguments.dweight.data && !arguments.dbias.data) return;
    const dim3 block = block_for(arguments.num_chunks());
    launch(sum_weights_kernel, dim3((arguments.channels + block.x - 1) / block.x), block,
           block.x * block.y * sizeof(float), stream, arguments);
}

}  // namespace fastvideo::cuda::norm
