// SPDX-License-Identifier: Apache-2.0
// The norms' operators on the CPU: checks, outputs, and rows or tasks shared out among threads.

#include <algorithm>
#include <tuple>

#include "norm/checks.h"
#include "norm/kernels_cpu.h"

namespace fastvideo::norm {
namespace {

using namespace fastvideo::cpu;

template <class Kernels>
const Kernels& of_dtype(const ByDtype<Kernels>& kernels, ScalarType dtype) {
    return dtype == ScalarType::Float      ? kernels.float32
           : dtype == ScalarType::BFloat16 ? kernels.bfloat16
                                           : kernels.float16;
}

Rows rows_of(const Tensor& x, void* data) {
    return {data, x.stride(0), x.stride(1), x.dim() == 4 ? x.stride(2) : 0};
}
Rows read_rows(const Tensor& x) { return rows_of(x, const_cast<void*>(x.const_data_ptr())); }
Rows write_rows(const Tensor& x) { return rows_of(x, x.mutable_data_ptr()); }

Vectors vectors_of(const Tensor& x, void* data) {
    const bool modulation = x.dim() == 3;
    return {data, x.scalar_type() == ScalarType::Float, modulation ? x.stride(0) : 0,
            modulation ? x.stride(1) : 0};
}
Vectors read_vectors(const OptionalTensor& x) {
    return x ? vectors_of(*x, const_cast<void*>(x->const_data_ptr())) : Vectors{};
}
// The gradient of `of`, if that was given.
Vectors write_vectors(const Tensor& gradient, const OptionalTensor& of) {
    return of ? vectors_of(gradient, gradient.mutable_data_ptr()) : Vectors{};
}

OptionalTensor with_dense_rows(const OptionalTensor& x) {
    return x ? OptionalTensor(fastvideo::with_dense_rows(*x)) : x;
}
using fastvideo::with_dense_rows;

// Rows that are worth another thread.
int64_t grain(int64_t channels) { return std::max<int64_t>(1, 32768 / channels); }

// body(first channel, last channel), cut at multiples of any vector's width.
template <class Body>
void parallel_for_channels(int64_t channels, const Body& body) {
    constexpr int64_t kBlock = 64;
    torch::stable::parallel_for(0, (channels + kBlock - 1) / kBlock, 1,
                                [&](int64_t first, int64_t last) {
                                    body(first * kBlock, std::min(last * kBlock, channels));
                                });
}

Tokens tokens_of(const Tensor& x, int64_t groups) {
    return {x.size(0), x.size(1), x.size(2), groups};
}

// Groups of the whole batch.
Split split_of(const Tokens& p) { return Split(p.batch * p.groups, p.tokens / p.groups); }

// x normalised, or the residual x with y * gate added first.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_given, const OptionalTensor& y_given, const OptionalTensor& gate_given,
    const OptionalTensor& weight_given, const OptionalTensor& bias_given,
    const OptionalTensor& scale_given, const OptionalTensor& shift_given, double eps,
    int64_t groups) {
    check_eps(eps);
    const Tensor x = with_dense_rows(x_given);
    const OptionalTensor y = with_dense_rows(y_given), gate = with_dense_rows(gate_given);
    const OptionalTensor weight = with_dense_rows(weight_given), bias = with_dense_rows(bias_given);
    const OptionalTensor scale = with_dense_rows(scale_given), shift = with_dense_rows(shift_given);
    LayerForward p{};
    static_cast<Tokens&>(p) = tokens_of(x, groups);
    const Tensor sum = y ? empty_rows_like(x_given) : x;
    const Tensor out = empty_rows_like(x_given);
    const Tensor mean = empty_float(x, {p.batch, p.tokens});
    const Tensor rstd = empty_float(x, {p.batch, p.tokens});
    p.x = read_rows(x);
    if (y) p.y = read_rows(*y);
    if (y) p.sum = write_rows(sum);
    p.out = write_rows(out);
    p.gate = read_vectors(gate);
    p.weight = read_vectors(weight);
    p.bias = read_vectors(bias);
    p.scale = read_vectors(scale);
    p.shift = read_vectors(shift);
    p.mean = mean.mutable_data_ptr<float>();
    p.rstd = rstd.mutable_data_ptr<float>();
    p.eps = static_cast<float>(eps);
    const LayerKernels& kernels = of_dtype(FASTVIDEO_KERNELS(layer_kernels), x.scalar_type());
    torch::stable::parallel_for(0, p.rows(), grain(p.dim), [&](int64_t first, int64_t last) {
        kernels.forward(p, first, last);
    });
    return {sum, out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const OptionalTensor& weight,
                                                 const OptionalTensor& bias,
                                                 const OptionalTensor& scale,
                                                 const OptionalTensor& shift, double eps) {
    const int64_t groups = check_layer(x, "x", {}, weight, bias, scale, shift);
    auto [sum, out, mean, rstd] = forward(x, {}, {}, weight, bias, scale, shift, eps, groups);
    return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_forward(
    const Tensor& residual, const Tensor& y, const OptionalTensor& gate,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, double eps) {
    const int64_t groups = check_layer(residual, "residual", gate, weight, bias, scale, shift);
    check_like(y, "y", residual, "residual");
    return forward(residual, y, gate, weight, bias, scale, shift, eps, groups);
}

struct LayerGradients {
    Tensor x, y, gate, weight, bias, scale, shift;
};

// With y: x is the sum, and grad_sum its gradient from elsewhere.
LayerGradients backward(const Tensor& grad_given, const OptionalTensor& grad_sum_given,
                        const Tensor& x_given, const OptionalTensor& y_given,
                        const Tensor& mean_given, const Tensor& rstd_given,
                        const OptionalTensor& gate_given, const OptionalTensor& weight_given,
                        const OptionalTensor& bias_given, const OptionalTensor& scale_given,
                        const OptionalTensor& shift_given, int64_t groups) {
    const Tensor grad = with_dense_rows(grad_given), x = with_dense_rows(x_given);
    const Tensor mean = torch::stable::contiguous(mean_given);
    const Tensor rstd = torch::stable::contiguous(rstd_given);
    const OptionalTensor grad_sum = with_dense_rows(grad_sum_given), y = with_dense_rows(y_given);
    const OptionalTensor gate = with_dense_rows(gate_given), weight = with_dense_rows(weight_given);
    const OptionalTensor bias = with_dense_rows(bias_given), scale = with_dense_rows(scale_given);
    const OptionalTensor shift = with_dense_rows(shift_given);
    LayerBackward p{};
    static_cast<Tokens&>(p) = tokens_of(x, groups);
    const LayerGradients gradients{
        empty_rows_like(x_given),        empty_rows_like(gate ? y_given : OptionalTensor(), x),
        empty_rows_like(gate_given, x),  empty_rows_like(weight_given, x),
        empty_rows_like(bias_given, x),  empty_rows_like(scale_given, x),
        empty_rows_like(shift_given, x),
    };
    p.grad = read_rows(grad);
    if (grad_sum) p.grad_sum = read_rows(*grad_sum);
    p.x = read_rows(x);
    if (y) p.y = read_rows(*y);
    p.mean = mean.const_data_ptr<float>();
    p.rstd = rstd.const_data_ptr<float>();
    p.gate = read_vectors(gate);
    p.weight = read_vectors(weight);
    p.bias = read_vectors(bias);
    p.scale = read_vectors(scale);
    p.shift = read_vectors(shift);
    p.dx = write_rows(gradients.x);
    if (gate) p.dy = write_rows(gradients.y);
    p.dgate = write_vectors(gradients.gate, gate);
    p.dweight = write_vectors(gradients.weight, weight);
    p.dbias = write_vectors(gradients.bias, bias);
    p.dscale = write_vectors(gradients.scale, scale);
    p.dshift = write_vectors(gradients.shift, shift);
    const Split split = split_of(p);
    const bool modulated = gate || scale || shift, affine = weight || bias;
    const Tensor piece_sums =
        empty_float(x, {modulated && split.pieces > 1 ? split.groups * split.pieces : 0, 3, p.dim});
    const Tensor task_sums = empty_float(x, {affine ? split.tasks : 0, 2, p.dim});
    p.piece_sums = piece_sums.mutable_data_ptr<float>();
    p.task_sums = task_sums.mutable_data_ptr<float>();
    const LayerKernels& kernels = of_dtype(FASTVIDEO_KERNELS(layer_kernels), x.scalar_type());
    torch::stable::parallel_for(0, split.tasks, 1, [&](int64_t first, int64_t last) {
        kernels.backward(p, split, first, last);
    });
    parallel_for_channels(
        p.dim, [&](int64_t first, int64_t last) { kernels.backward_sums(p, split, first, last); });
    return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift) {
    const int64_t groups = check_layer(x, "x", {}, weight, bias, scale, shift);
    check_like(grad, "grad", x, "x");
    check_float(mean, "mean", x, "x", {x.size(0), x.size(1)});
    check_float(rstd, "rstd", x, "x", {x.size(0), x.size(1)});
    const LayerGradients of =
        backward(grad, {}, x, {}, mean, rstd, {}, weight, bias, scale, shift, groups);
    return {of.x, of.weight, of.bias, of.scale, of.shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_backward(
    const Tensor& grad_sum, const Tensor& grad, const Tensor& y, const Tensor& sum,
    const Tensor& mean, const Tensor& rstd, const OptionalTensor& gate,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift) {
    const int64_t groups = check_layer(sum, "sum", gate, weight, bias, scale, shift);
    check_like(grad_sum, "grad_sum", sum, "sum");
    check_like(grad, "grad", sum, "sum");
    check_like(y, "y", sum, "sum");
    check_float(mean, "mean", sum, "sum", {sum.size(0), sum.size(1)});
    check_float(rstd, "rstd", sum, "sum", {sum.size(0), sum.size(1)});
    const LayerGradients of =
        backward(grad, grad_sum, sum, y, mean, rstd, gate, weight, bias, scale, shift, groups);
    return {of.x, of.y, of.gate, of.weight, of.bias, of.scale, of.shift};
}

Tensor residual_gate_forward(const Tensor& residual_given, const Tensor& y_given,
                             const Tensor& gate_given) {
    const int64_t groups = check_layer(residual_given, "residual", gate_given, {}, {}, {}, {});
    check_like(y_given, "y", residual_given, "residual");
    const Tensor residual = with_dense_rows(residual_given), y = with_dense_rows(y_given);
    const Tensor gate = with_dense_rows(gate_given), out = empty_rows_like(residual_given);
    GateForward p{};
    static_cast<Tokens&>(p) = tokens_of(residual, groups);
    p.x = read_rows(residual);
    p.y = read_rows(y);
    p.gate = read_vectors(gate);
    p.out = write_rows(out);
    const LayerKernels& kernels = of_dtype(FASTVIDEO_KERNELS(layer_kernels), y.scalar_type());
    torch::stable::parallel_for(0, p.rows(), grain(p.dim), [&](int64_t first, int64_t last) {
        kernels.gate_forward(p, first, last);
    });
    return out;
}

std::tuple<Tensor, Tensor> residual_gate_backward(const Tensor& grad_given, const Tensor& y_given,
                                                  const Tensor& gate_given) {
    const int64_t groups = check_layer(y_given, "y", gate_given, {}, {}, {}, {});
    check_like(grad_given, "grad", y_given, "y");
    const Tensor grad = with_dense_rows(grad_given), y = with_dense_rows(y_given);
    const Tensor gate = with_dense_rows(gate_given);
    const Tensor dy = empty_rows_like(y_given), dgate = empty_rows_like(gate_given);
    GateBackward p{};
    static_cast<Tokens&>(p) = tokens_of(y, groups);
    p.grad = read_rows(grad);
    p.y = read_rows(y);
    p.gate = read_vectors(gate);
    p.dy = write_rows(dy);
    p.dgate = write_vectors(dgate, gate);
    const Split split = split_of(p);
    const Tensor piece_sums =
        empty_float(y, {split.pieces > 1 ? split.groups * split.pieces : 0, p.dim});
    p.piece_sums = piece_sums.mutable_data_ptr<float>();
    const LayerKernels& kernels = of_dtype(FASTVIDEO_KERNELS(layer_kernels), y.scalar_type());
    torch::stable::parallel_for(0, split.tasks, 1, [&](int64_t first, int64_t last) {
        kernels.gate_backward(p, split, first, last);
    });
    parallel_for_channels(p.dim, [&](int64_t first, int64_t last) {
        kernels.gate_backward_sums(p, split, first, last);
    });
    return {dy, dgate};
}

Rms rms_of(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& cos,
           const OptionalTensor& sin, bool across_heads) {
    Rms p{x.size(0), x.size(1), x.size(2), x.size(3), across_heads, read_rows(x), {}, {}};
    p.weight = read_vectors(weight);
    if (cos)
        p.rotary = {cos->const_data_ptr<float>(),
                    sin->const_data_ptr<float>(),
                    cos->stride(0),
                    cos->stride(1),
                    sin->stride(0),
                    sin->stride(1)};
    return p;
}

std::tuple<Tensor, Tensor> rms_forward(const Tensor& x_given, const OptionalTensor& weight_given,
                                       const OptionalTensor& cos, const OptionalTensor& sin,
                                       bool across_heads, double eps) {
    check_rms(x_given, weight_given, cos, sin, across_heads);
    check_eps(eps);
    const Tensor x = with_dense_rows(x_given);
    const OptionalTensor weight = with_dense_rows(weight_given);
    RmsForward p{};
    static_cast<Rms&>(p) = rms_of(x, weight, cos, sin, across_heads);
    const Tensor out = empty_rows_like(x_given);
    const Tensor rstd = empty_float(x, {p.batch, p.tokens, across_heads ? 1 : p.heads});
    p.out = write_rows(out);
    p.rstd = rstd.mutable_data_ptr<float>();
    p.eps = static_cast<float>(eps);
    const RmsKernels& kernels = of_dtype(FASTVIDEO_KERNELS(rms_kernels), x.scalar_type());
    torch::stable::parallel_for(
        0, p.batch * p.tokens, grain(p.heads * p.dim),
        [&](int64_t first, int64_t last) { kernels.forward(p, first, last); });
    return {out, rstd};
}

std::tuple<Tensor, Tensor> rms_backward(const Tensor& grad_given, const Tensor& x_given,
                                        const Tensor& rstd_given,
                                        const OptionalTensor& weight_given,
                                        const OptionalTensor& cos, const OptionalTensor& sin,
                                        bool across_heads) {
    check_rms(x_given, weight_given, cos, sin, across_heads);
    check_like(grad_given, "grad", x_given, "x");
    check_float(rstd_given, "rstd", x_given, "x",
                {x_given.size(0), x_given.size(1), across_heads ? 1 : x_given.size(2)});
    const Tensor grad = with_dense_rows(grad_given), x = with_dense_rows(x_given);
    const Tensor rstd = torch::stable::contiguous(rstd_given);
    const OptionalTensor weight = with_dense_rows(weight_given);
    RmsBackward p{};
    static_cast<Rms&>(p) = rms_of(x, weight, cos, sin, across_heads);
    const Tensor dx = empty_rows_like(x_given), dweight = empty_rows_like(weight_given, x);
    p.grad = read_rows(grad);
    p.dx = write_rows(dx);
    p.rstd = rstd.const_data_ptr<float>();
    p.dweight = write_vectors(dweight, weight);
    const Split split(1, p.batch * p.tokens);
    const int64_t channels = weight ? weight->size(0) : 0;
    const Tensor task_sums = empty_float(x, {split.tasks, channels});
    p.task_sums = task_sums.mutable_data_ptr<float>();
    const RmsKernels& kernels = of_dtype(FASTVIDEO_KERNELS(rms_kernels), x.scalar_type());
    torch::stable::parallel_for(0, split.tasks, 1, [&](int64_t first, int64_t last) {
        kernels.backward(p, split, first, last);
    });
    parallel_for_channels(channels, [&](int64_t first, int64_t last) {
        kernels.backward_sums(p, split, first, last);
    });
    return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvideo, CPU, m) {
    m.impl("norm_layer_forward", TORCH_BOX(&layer_forward));
    m.impl("norm_layer_backward", TORCH_BOX(&layer_backward));
    m.impl("norm_residual_gate_forward", TORCH_BOX(&residual_gate_forward));
    m.impl("norm_residual_gate_backward", TORCH_BOX(&residual_gate_backward));
    m.impl("norm_residual_layer_forward", TORCH_BOX(&residual_layer_forward));
    m.impl("norm_residual_layer_backward", TORCH_BOX(&residual_layer_backward));
    m.impl("norm_rms_forward", TORCH_BOX(&rms_forward));
    m.impl("norm_rms_backward", TORCH_BOX(&rms_backward));
}

}  // namespace fastvideo::norm
