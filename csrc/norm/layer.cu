// SPDX-License-Identifier: Apache-2.0
// LayerNorm with weight, bias, scale and shift, of tokens or of a residual sum; and the sum alone.

#include "norm/norm.cuh"

namespace fastvideo::cuda::norm {

namespace {

enum class Mode { kLayer, kResidualLayer, kResidual };

// ---- forward -----------------------------------------------------------------------------------

constexpr int forward_inputs(Mode mode) { return mode == Mode::kLayer ? 1 : 2; }

template <class T, int kVectors, bool kStaged, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads<kVectors>)
    forward_kernel(const __grid_constant__ LayerForward p) {
    const Chunk chunk(p);
    const Columns columns{p.width};
    unsigned char* const stages = dynamic_shared() + BlockSum::kSharedBytes;
    auto inputs = [&] {
        using Reader = Inputs<T, kVectors, kStaged, forward_inputs(kMode)>;
        if constexpr (kMode == Mode::kLayer)
            return Reader(p, chunk, stages, p.x);
        else
            return Reader(p, chunk, stages, p.x, p.y);
    }();
    BlockSum block_sum(dynamic_shared());

    auto read = [&](const Vectors& vectors, int i, float otherwise) {
        const int64_t of_group = chunk.sample * vectors.batch + chunk.group * vectors.group;
        return load_vector<kStaged, T>(vectors, of_group + columns.first(i), columns.count(i),
                                       otherwise);
    };
    // normed * weight * (1 + scale) + (bias * (1 + scale) + shift)
    const auto factor = keep<kVectors>([&](int i) {
        Float8 product = read(p.weight, i, 1.0f);
        const Float8 scale = read(p.scale, i, 0.0f);
#pragma unroll
        for (int e = 0; e < kEight; ++e) product.at[e] *= 1.0f + scale.at[e];
        return product;
    });
    const auto offset = keep<kVectors>([&](int i) {
        Float8 sum = read(p.shift, i, 0.0f);
        const Float8 bias = read(p.bias, i, 0.0f), scale = read(p.scale, i, 0.0f);
#pragma unroll
        for (int e = 0; e < kEight; ++e) sum.at[e] += bias.at[e] * (1.0f + scale.at[e]);
        return sum;
    });
    const auto gate = keep<kVectors>([&](int i) { return read(p.gate, i, 1.0f); });

    T* const sums = sample_of<T>(p.sum, chunk.sample);
    T* const outs = sample_of<T>(p.out, chunk.sample);
    for (int row = 0; row < chunk.rows; ++row) {
        inputs.advance(row);
        const int token = chunk.first + row;
        Float8 x[kVectors];
        float total[] = {0.0f};
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            x[i] = inputs.get(0, i);
            if constexpr (kMode != Mode::kLayer) {
                const Float8 y = inputs.get(1, i), open = gate[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e)
                    x[i].at[e] =
                        to_float(from_float<T>(x[i].at[e] + y.at[e] * open.at[e]));
                store_channels<kStaged>(sums + token * p.sum.token + columns.first(i), x[i],
                                        columns.count(i));
            }
#pragma unroll
            for (int e = 0; e < kEight; ++e) total[0] += x[i].at[e];
        }
        if constexpr (kMode != Mode::kResidual) {
            block_sum(total);
            const float mean = total[0] / p.width;
            float squares[] = {0.0f};
#pragma unroll
            for (int i = 0; i < kVectors; ++i)
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    x[i].at[e] -= mean;
                    if (e < columns.count(i)) squares[0] += x[i].at[e] * x[i].at[e];
                }
            block_sum(squares);
            const float rstd = rsqrt_approx(squares[0] / p.width + p.eps);
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const Float8 by = factor[i], plus = offset[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e)
                    x[i].at[e] = x[i].at[e] * rstd * by.at[e] + plus.at[e];
                store_channels<kStaged>(outs + token * p.out.token + columns.first(i), x[i],
                                        columns.count(i));
            }
            if (threadIdx.x == 0) {
                const int64_t place =
                    static_cast<int64_t>(chunk.sample) * p.groups * p.group_rows + token;
                p.mean[place] = mean;
                p.rstd[place] = rstd;
            }
        }
    }
}

template <Mode kMode>
void forward(LayerForward& arguments, Stream stream) {
    constexpr int kInputs = forward_inputs(kMode);
    with_variant(arguments, kInputs, [&]<class V>(V variant) {
        const auto kernel = forward_kernel<typename V::T, V::kVectors, V::kStaged, kMode>;
        const Shape shape = plan(arguments, variant, kInputs, kernel, 1);
        launch_chunks(kernel, arguments, shape, stream);
    });
}

// ---- backward ----------------------------------------------------------------------------------

constexpr int backward_inputs(Mode mode) { return mode == Mode::kResidualLayer ? 4 : 2; }

template <class T, int kVectors, bool kStaged, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads<kVectors>)
    backward_kernel(const __grid_constant__ LayerBackward p) {
    const Chunk chunk(p);
    const Columns columns{p.width};
    unsigned char* const stages = dynamic_shared() + BlockSum::kSharedBytes;
    constexpr bool kNorm = kMode != Mode::kResidual, kGate = kMode != Mode::kLayer;
    constexpr int kX = 1, kY = kNorm ? 2 : 1, kGradSum = 3;  // beside grad, the first input
    auto inputs = [&] {
        using Reader = Inputs<T, kVectors, kStaged, backward_inputs(kMode)>;
        if constexpr (kMode == Mode::kLayer)
            return Reader(p, chunk, stages, p.grad, p.x);
        else if constexpr (kMode == Mode::kResidualLayer)
            return Reader(p, chunk, stages, p.grad, p.x, p.y, p.grad_sum);
        else
            return Reader(p, chunk, stages, p.grad, p.y);
    }();
    BlockSum block_sum(dynamic_shared());

    auto read = [&](const Vectors& vectors, int i, float otherwise) {
        const int64_t of_group = chunk.sample * vectors.batch + chunk.group * vectors.group;
        return load_vector<kStaged, T>(vectors, of_group + columns.first(i), columns.count(i),
                                       otherwise);
    };
    const auto factor = keep<kVectors>([&](int i) {
        Float8 product = read(p.weight, i, 1.0f);
        const Float8 scale = read(p.scale, i, 0.0f);
#pragma unroll
        for (int e = 0; e < kEight; ++e) product.at[e] *= 1.0f + scale.at[e];
        return product;
    });
    const auto gate = keep<kVectors>([&](int i) { return read(p.gate, i, 1.0f); });

    Float8 normed_sum[kVectors] = {}, grad_sum[kVectors] = {}, gate_sum[kVectors] = {};
    const T* const grad_sums = sample_of<const T>(p.grad_sum, chunk.sample);
    T* const dxs = sample_of<T>(p.dx, chunk.sample);
    T* const dys = sample_of<T>(p.dy, chunk.sample);
    const int64_t first_of_sample = static_cast<int64_t>(chunk.sample) * p.groups * p.group_rows;

    for (int row = 0; row < chunk.rows; ++row) {
        const int token = chunk.first + row;
        float mean = 0.0f, rstd = 0.0f;
        if constexpr (kNorm) {  // on their way while the row is waited for
            mean = p.mean[first_of_sample + token];
            rstd = p.rstd[first_of_sample + token];
        }
        inputs.advance(row);

        // Of grad * factor, and of that times normed.
        float means[] = {0.0f, 0.0f};
        if constexpr (kNorm) {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const Float8 grad = inputs.get(0, i), x = inputs.get(kX, i), by = factor[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    const float normed_grad = grad.at[e] * by.at[e];
                    means[0] += normed_grad;
                    means[1] += normed_grad * ((x.at[e] - mean) * rstd);
                }
            }
            block_sum(means);
            means[0] /= p.width;
            means[1] /= p.width;
        }

#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            Float8 grad = inputs.get(0, i);
            if constexpr (kNorm) {
                const Float8 x = inputs.get(kX, i), by = factor[i];
                Float8 other = filled(0.0f);
                if constexpr (kMode == Mode::kResidualLayer)
                    other = inputs.get(kGradSum, i);
                else if (p.grad_sum.data)
                    other = load_channels<kStaged>(
                        grad_sums + token * p.grad_sum.token + columns.first(i), columns.count(i));
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    const float normed = (x.at[e] - mean) * rstd;
                    normed_sum[i].at[e] += grad.at[e] * normed;
                    grad_sum[i].at[e] += grad.at[e];
                    grad.at[e] =
                        rstd * (grad.at[e] * by.at[e] - means[0] - normed * means[1]) +
                        other.at[e];
                }
                store_channels<kStaged>(dxs + token * p.dx.token + columns.first(i), grad,
                                        columns.count(i));
            }
            if constexpr (kGate) {
                const Float8 y = inputs.get(kY, i), open = gate[i];
#pragma unroll
                for (int e = 0; e < kEight; ++e) {
                    gate_sum[i].at[e] += grad.at[e] * y.at[e];
                    grad.at[e] *= open.at[e];
                }
                store_channels<kStaged>(dys + token * p.dy.token + columns.first(i), grad,
                                        columns.count(i));
            }
        }
    }

    auto write = [&](float* sums, const Float8(&values)[kVectors]) {
        if (!sums) return;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            store_channels<kStaged>(
                sums + static_cast<int64_t>(chunk.index) * p.width + columns.first(i), values[i],
                columns.count(i));
    };
    if constexpr (kNorm) {
        write(p.normed_sums, normed_sum);
        write(p.grad_sums, grad_sum);
    }
    if constexpr (kGate) write(p.gate_sums, gate_sum);
}

// Whether a gradient of (B,G,D) vectors can itself be what one chunk for each group writes.
bool holds_sums(const Vectors& gradient, const LayerBackward& p) {
    return gradient.data && gradient.is_float && p.chunks == 1 && gradient.group == p.width &&
           gradient.batch == static_cast<int64_t>(p.groups) * p.width;
}

// Sets where the sums over chunks go; null for those that no gradient is made of.
template <Mode kMode>
void place_sums(LayerBackward& p, const Allocate& allocate) {
    const bool to_weights = p.dweight.data || p.dbias.data;
    const bool as_they_are = !to_weights && !p.weight.data && !p.bias.data;
    auto place = [&](const Vectors& gradient, bool is_sum) -> float* {
        if (is_sum && !gradient.data) return nullptr;
        if (is_sum && holds_sums(gradient, p)) return static_cast<float*>(gradient.data);
        return allocate(p.num_chunks() * p.width);
    };
    if (kMode != Mode::kLayer) p.gate_sums = place(p.dgate, true);
    if (kMode == Mode::kResidual || !(to_weights || p.dscale.data || p.dshift.data)) return;
    p.normed_sums = place(p.dscale, as_they_are);
    p.grad_sums = place(p.dshift, as_they_are);
}

template <Mode kMode>
void backward(LayerBackward p, const Allocate& allocate, Stream stream) {
    constexpr int kInputs = backward_inputs(kMode);
    with_variant(p, kInputs, [&]<class V>(V variant) {
        // The sums of both do not fit into the registers of so many channels.
        if constexpr (kMode == Mode::kResidualLayer && V::kVectors > 2) {
            LayerBackward norm = p, residual = p;
            norm.dgate = {};
            backward<Mode::kLayer>(norm, allocate, stream);
            residual.grad = p.dx;
            residual.dweight = residual.dbias = residual.dscale = residual.dshift = {};
            backward<Mode::kResidual>(residual, allocate, stream);
        } else {
            const auto kernel = backward_kernel<typename V::T, V::kVectors, V::kStaged, kMode>;
            const Shape shape = plan(p, variant, kInputs, kernel, 4);
            place_sums<kMode>(p, allocate);
            launch_chunks(kernel, p, shape, stream);
            sum_groups(p, stream);
            sum_weights(p, stream);
        }
    });
}

}  // namespace

void layer_forward(LayerForward arguments, Stream stream) {
    if (!arguments.y.data)
        forward<Mode::kLayer>(arguments, stream);
    else if (arguments.out.data)
        forward<Mode::kResidualLayer>(arguments, stream);
    else
        forward<Mode::kResidual>(arguments, stream);
}

void layer_backward(LayerBackward arguments, const Allocate& allocate, Stream stream) {
    if (!arguments.y.data)
        backward<Mode::kLayer>(arguments, allocate, stream);
    else if (arguments.x.data)
        backward<Mode::kResidualLayer>(arguments, allocate, stream);
    else
        backward<Mode::kResidual>(arguments, allocate, stream);
}

}  // namespace fastvideo::cuda::norm
