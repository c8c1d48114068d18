// SPDX-License-Identifier: Apache-2.0
// Gradients of LayerNorm with weight, bias, scale and shift, of tokens or of a residual sum.

#include "norm/norm.cuh"

namespace fastvideo::cuda::norm {

namespace {

using Mode = BackwardMode;

constexpr int num_inputs(Mode mode) {
    return mode == Mode::kGatedLayer ? 4 : mode == Mode::kSumLayer ? 3 : 2;
}

template <class T, int kVectors, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads<kVectors>)
    layer_backward_kernel(const __grid_constant__ LayerBackward p) {
    constexpr bool kNorm = kMode != Mode::kGate;
    constexpr bool kGate = kMode == Mode::kGatedLayer || kMode == Mode::kGate;
    constexpr bool kHasGradSum = kMode == Mode::kSumLayer || kMode == Mode::kGatedLayer;
    constexpr bool kSums = kVectors <= kFewVectors;
    constexpr int kX = 1, kGradSum = 2, kY = kNorm ? 3 : 1;  // inputs beside grad, which is 0
    const Chunk chunk(p);
    const Columns columns{p.width};
    auto inputs = [&] {
        using Reader = Inputs<T, kVectors, num_inputs(kMode)>;
        unsigned char* const stages = dynamic_shared() + BlockSum::kSharedBytes;
        if constexpr (kMode == Mode::kLayer)
            return Reader(p, chunk, stages, p.grad, p.x);
        else if constexpr (kMode == Mode::kSumLayer)
            return Reader(p, chunk, stages, p.grad, p.x, p.grad_sum);
        else if constexpr (kMode == Mode::kGatedLayer)
            return Reader(p, chunk, stages, p.grad, p.x, p.grad_sum, p.y);
        else
            return Reader(p, chunk, stages, p.grad, p.y);
    }();
    BlockSum block_sum(dynamic_shared());

    auto read = [&](const Vectors& vectors, int i, float otherwise) {
        const int64_t of_group = chunk.sample * vectors.batch + chunk.group * vectors.group;
        return load_vector<T>(vectors, of_group + columns.first(i), otherwise);
    };
    const auto factor = keep<kVectors>(columns, [&](int i) {
        Float8 product = read(p.weight, i, 1.0f);
        const Float8 scale = read(p.scale, i, 0.0f);
#pragma unroll
        for (int e = 0; e < kEight; ++e) product.at[e] *= 1.0f + scale.at[e];
        return product;
    });
    const auto gate = keep<kVectors>(columns, [&](int i) { return read(p.gate, i, 1.0f); });

    constexpr int kKept = kSums ? kVectors : 1;
    Float8 normed_sum[kKept] = {}, grad_sum[kKept] = {}, gate_sum[kKept] = {};
    T* const dxs = sample_of<T>(p.dx, chunk.sample);
    T* const dys = sample_of<T>(p.dy, chunk.sample);
    for (int row = 0; row < chunk.rows; ++row) {
        const int token = chunk.first + row;
        float mean = 0.0f, rstd = 0.0f;
        if constexpr (kNorm) {  // on their way while the row is waited for
            const int64_t first = static_cast<int64_t>(chunk.sample) * p.groups * p.group_rows;
            mean = p.mean[first + token];
            rstd = p.rstd[first + token];
        }
        inputs.advance(row);

        float means[] = {0.0f, 0.0f};  // of grad * factor, and of that times normed
        if constexpr (kNorm) {
#pragma unroll kUnroll < kVectors>
            for (int i = 0; i < kVectors; ++i) {
                if (!columns.has(i)) continue;
                const Float8 grad = inputs.get(0, i), x = inputs.get(kX, i), by = factor[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    const float normed_grad = grad.at[e] * by.at[e];
                    means[0] += normed_grad;
                    means[1] += normed_grad * ((x.at[e] - mean) * rstd);
                }
            }
            block_sum(means);
            means[0] /= p.channels;
            means[1] /= p.channels;
        }

#pragma unroll kUnroll < kVectors>
        for (int i = 0; i < kVectors; ++i) {
            if (!columns.has(i)) continue;
            Float8 grad = inputs.get(0, i);
            if constexpr (kNorm) {
                const Float8 x = inputs.get(kX, i), by = factor[i];
                Float8 other = filled(0.0f);
                if constexpr (kHasGradSum) other = inputs.get(kGradSum, i);
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    const float normed = (x.at[e] - mean) * rstd;
                    if constexpr (kSums) {
                        normed_sum[i].at[e] += grad.at[e] * normed;
                        grad_sum[i].at[e] += grad.at[e];
                    }
                    grad.at[e] =
                        rstd * (grad.at[e] * by.at[e] - means[0] - normed * means[1]) + other.at[e];
                }
                store_eight(dxs + token * p.dx.token + columns.first(i), grad);
            }
            if constexpr (kGate) {
                const Float8 y = inputs.get(kY, i), by = gate[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    if constexpr (kSums) gate_sum[i].at[e] += grad.at[e] * y.at[e];
                    grad.at[e] *= by.at[e];
                }
                store_eight(dys + token * p.dy.token + columns.first(i), grad);
            }
        }
    }

    auto write = [&](float* sums, const Float8(&values)[kKept]) {
        if (!sums) return;
        sums += static_cast<int64_t>(chunk.index) * p.width;
#pragma unroll kUnroll < kVectors>
        for (int i = 0; i < kVectors; ++i)
            if (columns.has(i)) store_sums(sums + columns.first(i), values[i]);
    };
    if constexpr (kSums && kNorm) {
        write(p.normed_sums, normed_sum);
        write(p.grad_sums, grad_sum);
    }
    if constexpr (kSums && kGate) write(p.gate_sums, gate_sum);
}

// Whether a gradient of (B,G,D) vectors can itself be what one chunk for each group writes.
bool holds_sums(const Vectors& gradient, const LayerBackward& p) {
    return p.chunks == 1 && p.width == p.channels && gradient.is_float &&
           gradient.group == p.width &&
           gradient.batch == static_cast<int64_t>(p.groups) * p.width &&
           reinterpret_cast<uintptr_t>(gradient.data) % sizeof(float4) == 0;
}

// Sets where the sums over chunks go; null for those that no gradient is made of.
void place_sums(LayerBackward& p, const Allocate& allocate) {
    const bool to_weights = p.dweight.data || p.dbias.data;
    const bool as_they_are = !to_weights && !p.weight.data && !p.bias.data;
    auto place = [&](const Vectors& gradient, bool is_sum) -> float* {
        if (is_sum && !gradient.data) return nullptr;
        if (is_sum && holds_sums(gradient, p)) return static_cast<float*>(gradient.data);
        return allocate(p.num_chunks() * p.width);
    };
    p.gate_sums = place(p.dgate, true);
    if (!to_weights && !p.dscale.data && !p.dshift.data) return;
    p.normed_sums = place(p.dscale, as_they_are);
    p.grad_sums = place(p.dshift, as_they_are);
}

template <Mode kMode>
void run(LayerBackward& arguments, const Allocate& allocate, Stream stream) {
    with_variant(arguments, [&]<class V>(V variant) {
        const auto kernel = layer_backward_kernel<typename V::T, V::kVectors, kMode>;
        const Shape shape = plan(arguments, variant, num_inputs(kMode), kernel, 4);
        place_sums(arguments, allocate);
        launch_chunks(kernel, arguments, shape, stream);
        if (V::kVectors > kFewVectors) sum_columns(arguments, stream);
    });
    sum_groups(arguments, stream);
    sum_weights(arguments, stream);
}

}  // namespace

void layer_backward(LayerBackward arguments, const Allocate& allocate, Stream stream) {
    switch (arguments.mode) {
        case Mode::kLayer:
            return run<Mode::kLayer>(arguments, allocate, stream);
        case Mode::kSumLayer:
            return run<Mode::kSumLayer>(arguments, allocate, stream);
        case Mode::kGatedLayer:
            return run<Mode::kGatedLayer>(arguments, allocate, stream);
        case Mode::kGate:
            return run<Mode::kGate>(arguments, allocate, stream);
    }
}

}  // namespace fastvideo::cuda::norm
