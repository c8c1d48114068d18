// SPDX-License-Identifier: Apache-2.0
// The norms' operators on CUDA devices: checks, outputs, and what kernels need to know of tensors.

#include <cstdint>
#include <tuple>
#include <vector>

#include "norm/checks.h"
#include "norm/kernels_cuda.h"

namespace fastvideo::cuda::norm {
namespace {

using namespace fastvideo::norm;

// ---- tensors as the kernels see them ----------------------------------------------------------

constexpr int64_t kEight = 8;

// Kernels access eight channels at a time: whether they can.
bool is_in_eights(const Tensor& x) {
    constexpr int64_t kBytes = 16;
    const int64_t last = x.dim() - 1;
    if (x.size(last) % kEight || x.stride(last) != 1) return false;
    for (int64_t i = 0; i < last; ++i)
        if (x.size(i) > 1 && x.stride(i) % kEight) return false;
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kBytes == 0;
}

int64_t rounded_to_eights(int64_t channels) { return (channels + kEight - 1) / kEight * kEight; }

// `x`, or a copy with zeros after the channels of each row.
Tensor in_eights(const Tensor& x) {
    if (is_in_eights(x)) return x;
    const int64_t last = x.dim() - 1;
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape[last] = rounded_to_eights(shape[last]);
    Tensor copy = torch::stable::new_zeros(x, shape);
    Tensor channels = torch::stable::narrow(copy, last, 0, x.size(last));
    torch::stable::copy_(channels, x);
    return copy;
}
OptionalTensor in_eights(const OptionalTensor& x) { return x ? OptionalTensor(in_eights(*x)) : x; }

// An output, or another tensor that kernels can write in its place and finish() copies.
Tensor writable(const Tensor& output) {
    return is_in_eights(output) ? output
                                : in_eights(torch::stable::new_empty(output, output.sizes()));
}
void finish(const Tensor& output, const Tensor& written) {
    if (output.get() == written.get()) return;
    Tensor from = written, to = output;
    const int64_t last = output.dim() - 1;
    torch::stable::copy_(to, torch::stable::narrow(from, last, 0, output.size(last)));
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

int to_int(int64_t size) {
    STD_TORCH_CHECK(size <= INT32_MAX, "norm: a size of ", size, ", expected at most ", INT32_MAX);
    return static_cast<int>(size);
}

Dtype dtype_of(const Tensor& x) {
    return x.scalar_type() == ScalarType::Float      ? Dtype::kFloat
           : x.scalar_type() == ScalarType::BFloat16 ? Dtype::kBFloat16
                                                     : Dtype::kFloat16;
}

// `heads` rows of `channels` for each token of `x`.
Grid grid_of(const Tensor& x, int64_t groups, int64_t heads, int64_t channels) {
    STD_TORCH_CHECK(channels <= kMaxWidth, "norm: rows have ", channels,
                    " channels, expected at most ", kMaxWidth);
    Grid grid;
    grid.batch = to_int(x.size(0));
    grid.groups = to_int(groups);
    grid.group_rows = to_int(x.size(1) * heads) / grid.groups;
    grid.heads = to_int(heads);
    grid.channels = to_int(channels);
    grid.width = to_int(rounded_to_eights(channels));
    grid.dtype = dtype_of(x);
    return grid;
}

// Scratch memory for as long as this lives; the device may use it longer, in the stream's order.
class Scratch {
  public:
    explicit Scratch(const Tensor& like) : like_(like) {}
    Allocate allocate() {
        return [this](int64_t floats) {
            tensors_.push_back(empty_float(like_, {floats}));
            return tensors_.back().mutable_data_ptr<float>();
        };
    }

  private:
    const Tensor& like_;
    std::vector<Tensor> tensors_;
};

// ---- layer norm --------------------------------------------------------------------------------

// x normalised, or the residual x with y * gate added first.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x_given, const OptionalTensor& y_given, const OptionalTensor& gate_given,
    const OptionalTensor& weight_given, const OptionalTensor& bias_given,
    const OptionalTensor& scale_given, const OptionalTensor& shift_given, double eps,
    int64_t groups) {
    check_eps(eps);
    const OnDeviceOf device(x_given);
    const Tensor x = in_eights(x_given);
    const OptionalTensor y = in_eights(y_given), gate = in_eights(gate_given);
    const OptionalTensor weight = in_eights(weight_given), bias = in_eights(bias_given);
    const OptionalTensor scale = in_eights(scale_given), shift = in_eights(shift_given);
    const Tensor sum = y ? empty_rows_like(x_given) : x_given, out = empty_rows_like(x_given);
    const Tensor written_sum = y ? writable(sum) : sum, written_out = writable(out);
    const Tensor mean = empty_float(x, {x.size(0), x.size(1)});
    const Tensor rstd = empty_float(x, {x.size(0), x.size(1)});
    LayerForward p;
    static_cast<Grid&>(p) = grid_of(x, groups, 1, x_given.size(2));
    p.x = read_rows(x);
    if (y) {
        p.mode = ForwardMode::kSumLayer;
        p.y = read_rows(*y);
        p.sum = write_rows(written_sum);
    }
    p.out = write_rows(written_out);
    p.gate = read_vectors(gate);
    p.weight = read_vectors(weight);
    p.bias = read_vectors(bias);
    p.scale = read_vectors(scale);
    p.shift = read_vectors(shift);
    p.mean = mean.mutable_data_ptr<float>();
    p.rstd = rstd.mutable_data_ptr<float>();
    p.eps = static_cast<float>(eps);
    layer_forward(p, device.stream());
    finish(sum, written_sum);
    finish(out, written_out);
    return {sum, out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_layer_forward(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias,
                                                      const OptionalTensor& scale,
                                                      const OptionalTensor& shift, double eps) {
    const int64_t groups = check_layer(x, "x", {}, weight, bias, scale, shift);
    auto [sum, out, mean, rstd] = forward(x, {}, {}, weight, bias, scale, shift, eps, groups);
    return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_residual_layer_forward(
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

// With grad_sum: x is the sum.
LayerGradients backward(const Tensor& grad_given, const OptionalTensor& grad_sum_given,
                        const Tensor& x_given, const OptionalTensor& y_given,
                        const Tensor& mean_given, const Tensor& rstd_given,
                        const OptionalTensor& gate_given, const OptionalTensor& weight_given,
                        const OptionalTensor& bias_given, const OptionalTensor& scale_given,
                        const OptionalTensor& shift_given, int64_t groups) {
    const OnDeviceOf device(x_given);
    const Tensor grad = in_eights(grad_given), x = in_eights(x_given);
    const Tensor mean = torch::stable::contiguous(mean_given);
    const Tensor rstd = torch::stable::contiguous(rstd_given);
    const OptionalTensor grad_sum = in_eights(grad_sum_given);
    const OptionalTensor gate = in_eights(gate_given), weight = in_eights(weight_given);
    const OptionalTensor bias = in_eights(bias_given), scale = in_eights(scale_given);
    const LayerGradients gradients{
        empty_rows_like(x_given),        empty_rows_like(gate ? y_given : OptionalTensor(), x),
        empty_rows_like(gate_given, x),  empty_rows_like(weight_given, x),
        empty_rows_like(bias_given, x),  empty_rows_like(scale_given, x),
        empty_rows_like(shift_given, x),
    };
    const Tensor written_dx = writable(gradients.x);
    const Tensor written_dy = gate ? writable(gradients.y) : gradients.y;
    const OptionalTensor y = gate ? in_eights(y_given) : y_given;
    LayerBackward p;
    static_cast<Grid&>(p) = grid_of(x, groups, 1, x_given.size(2));
    p.mode = gate       ? BackwardMode::kGatedLayer
             : grad_sum ? BackwardMode::kSumLayer
                        : BackwardMode::kLayer;
    p.grad = read_rows(grad);
    if (grad_sum) p.grad_sum = read_rows(*grad_sum);
    p.x = read_rows(x);
    p.mean = mean.const_data_ptr<float>();
    p.rstd = rstd.const_data_ptr<float>();
    p.weight = read_vectors(weight);
    p.bias = read_vectors(bias);
    p.scale = read_vectors(scale);
    p.dx = write_rows(written_dx);
    if (gate) {
        p.y = read_rows(*y);
        p.gate = read_vectors(gate);
        p.dy = write_rows(written_dy);
    }
    p.dgate = write_vectors(gradients.gate, gate_given);
    p.dweight = write_vectors(gradients.weight, weight_given);
    p.dbias = write_vectors(gradients.bias, bias_given);
    p.dscale = write_vectors(gradients.scale, scale_given);
    p.dshift = write_vectors(gradients.shift, shift_given);
    Scratch scratch(x);
    layer_backward(p, scratch.allocate(), device.stream());
    finish(gradients.x, written_dx);
    finish(gradients.y, written_dy);
    return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_layer_backward(
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_residual_layer_backward(
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

// ---- residual sum ------------------------------------------------------------------------------

Tensor norm_residual_gate_forward(const Tensor& residual_given, const Tensor& y_given,
                                  const Tensor& gate_given) {
    const int64_t groups = check_layer(residual_given, "residual", gate_given, {}, {}, {}, {});
    check_like(y_given, "y", residual_given, "residual");
    const OnDeviceOf device(residual_given);
    const Tensor residual = in_eights(residual_given), y = in_eights(y_given);
    const Tensor gate = in_eights(gate_given);
    const Tensor sum = empty_rows_like(residual_given), written = writable(sum);
    LayerForward p;
    static_cast<Grid&>(p) = grid_of(residual, groups, 1, residual_given.size(2));
    p.mode = ForwardMode::kSum;
    p.x = read_rows(residual);
    p.y = read_rows(y);
    p.gate = read_vectors(gate);
    p.sum = write_rows(written);
    layer_forward(p, device.stream());
    finish(sum, written);
    return sum;
}

std::tuple<Tensor, Tensor> norm_residual_gate_backward(const Tensor& grad_given,
                                                       const Tensor& y_given,
                                                       const Tensor& gate_given) {
    const int64_t groups = check_layer(y_given, "y", gate_given, {}, {}, {}, {});
    check_like(grad_given, "grad", y_given, "y");
    const OnDeviceOf device(y_given);
    const Tensor grad = in_eights(grad_given), y = in_eights(y_given);
    const Tensor gate = in_eights(gate_given);
    const Tensor dy = empty_rows_like(y_given), dgate = empty_rows_like(gate_given);
    const Tensor written = writable(dy);
    LayerBackward p;
    static_cast<Grid&>(p) = grid_of(y, groups, 1, y_given.size(2));
    p.mode = BackwardMode::kGate;
    p.grad = read_rows(grad);
    p.y = read_rows(y);
    p.gate = read_vectors(gate);
    p.dy = write_rows(written);
    p.dgate = write_vectors(dgate, gate_given);
    Scratch scratch(y);
    layer_backward(p, scratch.allocate(), device.stream());
    finish(dy, written);
    return {dy, dgate};
}

// ---- RMS norm ----------------------------------------------------------------------------------

Angles angles_of(const OptionalTensor& angles) {
    return angles ? Angles{angles->const_data_ptr<float>(), angles->stride(0), angles->stride(1)}
                  : Angles{};
}

// Whether those of four pairs of channels, which are of one head, can be loaded at once.
bool are_angles_in_fours(const OptionalTensor& angles) {
    constexpr int64_t kFour = 4, kBytes = 16;
    return angles && angles->stride(1) == 1 && angles->stride(0) % kFour == 0 &&
           angles->size(1) % kFour == 0 &&
           reinterpret_cast<uintptr_t>(angles->const_data_ptr()) % kBytes == 0;
}

// Whether all heads of a token are one row in memory.
bool has_dense_heads(const Tensor& x) {
    return x.stride(3) == 1 && (x.size(2) <= 1 || x.stride(2) == x.size(3));
}

// How a kernel sees (B,S,H,D): heads in a row where they are normalised together, and also side by
// side where their vectors of eight channels divide a warp, otherwise as rows of their own.
struct Layout {
    bool across_heads, side_by_side;

    Layout(std::initializer_list<Tensor> tensors, bool across_heads) : across_heads(across_heads) {
        constexpr int64_t kWarp = 32;
        const Tensor& x = *tensors.begin();
        const int64_t heads = x.size(2), dim = x.size(3);
        side_by_side = !across_heads && dim % kEight == 0 && kWarp % (dim / kEight) == 0 &&
                       heads * dim <= kMaxWidth;
        for (const Tensor& tensor : tensors) side_by_side = side_by_side && has_dense_heads(tensor);
    }
    bool in_row() const { return across_heads || side_by_side; }

    Tensor rows(const Tensor& x) const {
        if (!in_row()) return x;
        return torch::stable::reshape(x, {x.size(0), x.size(1), x.size(2) * x.size(3)});
    }
    // The output itself if its heads allow that, otherwise a tensor for finish_heads().
    Tensor writable_rows(const Tensor& output) const {
        const bool itself = !in_row() || has_dense_heads(output);
        return rows(itself ? output : torch::stable::new_empty(output, output.sizes()));
    }
    void finish_heads(const Tensor& output, const Tensor& rows) const {
        if (output.const_data_ptr() == rows.const_data_ptr()) return;
        Tensor to = output;
        torch::stable::copy_(to, torch::stable::view(rows, output.sizes()));
    }
};

Rms rms_of(const Tensor& x_given, const Layout& layout, const Tensor& rows,
           const OptionalTensor& weight, const OptionalTensor& cos, const OptionalTensor& sin) {
    const int64_t heads = x_given.size(2), dim = x_given.size(3);
    Rms p;
    static_cast<Grid&>(p) =
        grid_of(x_given, 1, layout.in_row() ? 1 : heads, layout.in_row() ? heads * dim : dim);
    p.head_dim = to_int(dim);
    p.heads_in_row = layout.side_by_side;
    p.x = read_rows(rows);
    p.weight = read_vectors(weight);
    p.cos = angles_of(cos);
    p.sin = angles_of(sin);
    p.aligned_angles = are_angles_in_fours(cos) && are_angles_in_fours(sin);
    return p;
}

std::tuple<Tensor, Tensor> norm_rms_forward(const Tensor& x, const OptionalTensor& weight_given,
                                            const OptionalTensor& cos, const OptionalTensor& sin,
                                            bool across_heads, double eps) {
    check_rms(x, weight_given, cos, sin, across_heads);
    check_eps(eps);
    const OnDeviceOf device(x);
    const Tensor out = empty_rows_like(x);
    const Layout layout({x, out}, across_heads);
    const Tensor rows = in_eights(layout.rows(x));
    const OptionalTensor weight = in_eights(weight_given);
    const Tensor out_rows = layout.writable_rows(out), written = writable(out_rows);
    const Tensor rstd = empty_float(x, {x.size(0), x.size(1), across_heads ? 1 : x.size(2)});
    RmsForward p;
    static_cast<Rms&>(p) = rms_of(x, layout, rows, weight, cos, sin);
    p.out = write_rows(written);
    p.rstd = rstd.mutable_data_ptr<float>();
    p.eps = static_cast<float>(eps);
    rms_forward(p, device.stream());
    finish(out_rows, written);
    layout.finish_heads(out, out_rows);
    return {out, rstd};
}

std::tuple<Tensor, Tensor> norm_rms_backward(const Tensor& grad_given, const Tensor& x,
                                             const Tensor& rstd_given,
                                             const OptionalTensor& weight_given,
                                             const OptionalTensor& cos, const OptionalTensor& sin,
                                             bool across_heads) {
    check_rms(x, weight_given, cos, sin, across_heads);
    check_like(grad_given, "grad", x, "x");
    check_float(rstd_given, "rstd", x, "x", {x.size(0), x.size(1), across_heads ? 1 : x.size(2)});
    const OnDeviceOf device(x);
    const Tensor dx = empty_rows_like(x), dweight = empty_rows_like(weight_given, x);
    const Layout layout({x, grad_given, dx}, across_heads);
    const Tensor rows = in_eights(layout.rows(x)), grad = in_eights(layout.rows(grad_given));
    const Tensor rstd = torch::stable::contiguous(rstd_given);
    const OptionalTensor weight = in_eights(weight_given);
    const Tensor dx_rows = layout.writable_rows(dx), written = writable(dx_rows);
    RmsBackward p;
    static_cast<Rms&>(p) = rms_of(x, layout, rows, weight, cos, sin);
    p.grad = read_rows(grad);
    p.dx = write_rows(written);
    p.rstd = rstd.const_data_ptr<float>();
    p.dweight = write_vectors(dweight, weight_given);
    Scratch scratch(x);
    rms_backward(p, scratch.allocate(), device.stream());
    finish(dx_rows, written);
    layout.finish_heads(dx, dx_rows);
    return {dx, dweight};
}

}  // namespace

FASTVIDEO_CUDA_IMPL(m) {
    m.impl("norm_layer_forward", TORCH_BOX(&norm_layer_forward));
    m.impl("norm_layer_backward", TORCH_BOX(&norm_layer_backward));
    m.impl("norm_residual_gate_forward", TORCH_BOX(&norm_residual_gate_forward));
    m.impl("norm_residual_gate_backward", TORCH_BOX(&norm_residual_gate_backward));
    m.impl("norm_residual_layer_forward", TORCH_BOX(&norm_residual_layer_forward));
    m.impl("norm_residual_layer_backward", TORCH_BOX(&norm_residual_layer_backward));
    m.impl("norm_rms_forward", TORCH_BOX(&norm_rms_forward));
    m.impl("norm_rms_backward", TORCH_BOX(&norm_rms_backward));
}

}  // namespace fastvideo::cuda::norm
