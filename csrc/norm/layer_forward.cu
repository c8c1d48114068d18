// SPDX-License-Identifier: Apache-2.0
// LayerNorm with weight, bias, scale and shift, of tokens or of a residual sum; and the sum alone.

#include "norm/norm.cuh"

namespace fastvideo::cuda::norm {

namespace {

using Mode = ForwardMode;

// Blocks of the widest rows take half of a multiprocessor with two vectors for each thread.
template <class T, int kVectors, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads<kVectors>, 4 / kVectors)
    layer_forward_kernel(const __grid_constant__ LayerForward p) {
    constexpr bool kFew = kVectors <= kFewVectors;
    const Chunk chunk(p);
    const Columns columns{p.width};
    auto inputs = [&] {
        unsigned char* const stages = dynamic_shared() + BlockSum::kSharedBytes;
        if constexpr (kMode == Mode::kLayer)
            return Inputs<T, kVectors, 1>(p, chunk, stages, p.x);
        else
            return Inputs<T, kVectors, 2>(p, chunk, stages, p.x, p.y);
    }();
    BlockSum block_sum(dynamic_shared());

    auto read = [&](const Vectors& vectors, int i, float otherwise) {
        const int64_t of_group = chunk.sample * vectors.batch + chunk.group * vectors.group;
        return load_vector<T>(vectors, of_group + columns.first(i), otherwise);
    };
    // out = normed * (weight * (1 + scale)) + (bias * (1 + scale) + shift)
    const auto factor = keep<kVectors>(columns, [&](int i) {
        Float8 product = read(p.weight, i, 1.0f);
        const Float8 scale = read(p.scale, i, 0.0f);
#pragma unroll
        for (int e = 0; e < kEight; ++e) product.at[e] *= 1.0f + scale.at[e];
        return product;
    });
    const auto offset = keep<kVectors>(columns, [&](int i) {
        Float8 sum = read(p.shift, i, 0.0f);
        const Float8 bias = read(p.bias, i, 0.0f), scale = read(p.scale, i, 0.0f);
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum.at[e] += bias.at[e] * (1.0f + scale.at[e]);
        return sum;
    });
    const auto gate = keep<kVectors>(columns, [&](int i) { return read(p.gate, i, 1.0f); });

    T* const sums = sample_of<T>(p.sum, chunk.sample);
    T* const outs = sample_of<T>(p.out, chunk.sample);
    for (int row = 0; row < chunk.rows; ++row) {
        inputs.advance(row);
        const int token = chunk.first + row;
        Float8 kept[kFew ? kVectors : 1] = {};
        float total[] = {0.0f};
#pragma unroll kUnroll < kVectors>
        for (int i = 0; i < kVectors; ++i) {
            if (!columns.has(i)) continue;
            Float8 x = inputs.get(0, i);
            if constexpr (kMode != Mode::kLayer) {
                const Float8 y = inputs.get(1, i), by = gate[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e)
                    x.at[e] = to_float(from_float<T>(x.at[e] + y.at[e] * by.at[e]));
                store_eight(sums + token * p.sum.token + columns.first(i), x);
            }
            if constexpr (kFew) kept[i] = x;
#pragma unroll
            for (int e = 0; e < kEight; ++e) total[0] += x.at[e];
        }
        if constexpr (kMode != Mode::kSum) {
            auto normed_row = [&](int i) {  // read again where a thread has much of it
                if constexpr (kFew)
                    return kept[i];
                else if constexpr (kMode == Mode::kLayer)
                    return inputs.get(0, i);
                else
                    return load_eight(sums + token * p.sum.token + columns.first(i));
            };
            block_sum(total);
            const float mean = total[0] / p.channels;
            float squares[] = {0.0f};
#pragma unroll kUnroll < kVectors>
            for (int i = 0; i < kVectors; ++i) {
                if (!columns.has(i)) continue;
                const Float8 x = normed_row(i);
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    const float centred = x.at[e] - mean;
                    if (columns.first(i) + e < p.channels) squares[0] += centred * centred;
                }
            }
            block_sum(squares);
            const float rstd = rsqrt_approx(squares[0] / p.channels + p.eps);
#pragma unroll kUnroll < kVectors>
            for (int i = 0; i < kVectors; ++i) {
                if (!columns.has(i)) continue;
                Float8 x = normed_row(i);
                const Float8 by = factor[i], plus = offset[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e)
                    x.at[e] = (x.at[e] - mean) * rstd * by.at[e] + plus.at[e];
                store_eight(outs + token * p.out.token + columns.first(i), x);
            }
            if (threadIdx.x == 0) {
                const int64_t first = static_cast<int64_t>(chunk.sample) * p.groups * p.group_rows;
                p.mean[first + token] = mean;
                p.rstd[first + token] = rstd;
            }
        }
    }
}

template <Mode kMode>
void run(LayerForward& arguments, Stream stream) {
    with_variant(arguments, [&]<class V>(V variant) {
        const auto kernel = layer_forward_kernel<typename V::T, V::kVectors, kMode>;
        const Shape shape = plan(arguments, variant, kMode == Mode::kLayer ? 1 : 2, kernel, 1);
        launch_chunks(kernel, arguments, shape, stream);
    });
}

}  // namespace

void layer_forward(LayerForward arguments, Stream stream) {
    switch (arguments.mode) {
        case Mode::kLayer:
            return run<Mode::kLayer>(arguments, stream);
        case Mode::kSumLayer:
            return run<Mode::kSumLayer>(arguments, stream);
        case Mode::kSum:
            return run<Mode::kSum>(arguments, stream);
    }
}

}  // namespace fastvideo::cuda::norm
