// SPDX-License-Identifier: Apache-2.0
// What the norms accept and the outputs they allocate; the same on every device.
//
// Axes: B batch, S tokens, D channels, G runs of tokens that share a modulation, H heads.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace fastvideo::norm {

inline void check_dtype_of_x(const Tensor& x, const char* name) {
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        name, " is ", name_of(dtype), ", expected float32, bfloat16 or float16");
}

// Parameters and modulations may stay in float32 beside 16-bit tokens.
inline void check_dtype_of_vector(const Tensor& vector, const char* name, const Tensor& x,
                                  const char* x_name) {
    const ScalarType dtype = vector.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == x.scalar_type(), name, " is ",
                    name_of(dtype), ", expected float32 or the dtype of ", x_name, ", ",
                    name_of(x.scalar_type()));
}

// Tokens (B,S,D) of one of the three dtypes, D at least 1.
inline void check_tokens(const Tensor& x, const char* name) {
    check_dtype_of_x(x, name);
    check_shape(x, name, {-1, -1, -1});
    STD_TORCH_CHECK(x.size(2) > 0, name, " has shape ", shape_of(x), ", expected channels");
}

// Tokens or heads of the dtype, shape and device of `x`.
inline void check_like(const Tensor& other, const char* name, const Tensor& x, const char* x_name) {
    check_same_device(other, name, x, x_name);
    check_dtype(other, name, x.scalar_type());
    if (x.dim() == 3)
        check_shape(other, name, {x.size(0), x.size(1), x.size(2)});
    else
        check_shape(other, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
}

// A weight or bias of `size` channels, if given.
inline void check_affine(const OptionalTensor& vector, const char* name, const Tensor& x,
                         const char* x_name, int64_t size) {
    if (!vector) return;
    check_same_device(*vector, name, x, x_name);
    check_dtype_of_vector(*vector, name, x, x_name);
    check_shape(*vector, name, {size});
}

// A scale, shift or gate (B,G,D), if given. `groups` is G once one of them is known, until then 0.
inline void check_modulation(const OptionalTensor& vectors, const char* name, const Tensor& x,
                             const char* x_name, int64_t& groups) {
    if (!vectors) return;
    check_same_device(*vectors, name, x, x_name);
    check_dtype_of_vector(*vectors, name, x, x_name);
    check_shape(*vectors, name, {x.size(0), groups ? groups : -1, x.size(2)});
    groups = vectors->size(1);
    STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, name, " has shape ", shape_of(*vectors),
                    ", expected a number of runs that divides the ", x.size(1), " tokens of ",
                    x_name);
}

inline void check_eps(double eps) {
    STD_TORCH_CHECK(eps >= 0, "eps is ", eps, ", expected a number of at least 0");
}

// A float32 tensor beside x: mean, rstd, cos, sin.
inline void check_float(const Tensor& given, const char* name, const Tensor& x, const char* x_name,
                        std::initializer_list<int64_t> shape) {
    check_same_device(given, name, x, x_name);
    check_dtype(given, name, ScalarType::Float);
    check_shape(given, name, shape);
}

// All that norm_layer and norm_residual_layer take beside tokens and statistics; returns G, which
// is 1 where nothing has runs.
inline int64_t check_layer(const Tensor& x, const char* x_name, const OptionalTensor& gate,
                           const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& scale, const OptionalTensor& shift) {
    check_tokens(x, x_name);
    check_affine(weight, "weight", x, x_name, x.size(2));
    check_affine(bias, "bias", x, x_name, x.size(2));
    int64_t groups = 0;
    check_modulation(gate, "gate", x, x_name, groups);
    check_modulation(scale, "scale", x, x_name, groups);
    check_modulation(shift, "shift", x, x_name, groups);
    return groups ? groups : 1;
}

// All that norm_rms takes beside statistics.
inline void check_rms(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& cos,
                      const OptionalTensor& sin, bool across_heads) {
    check_dtype_of_x(x, "x");
    check_shape(x, "x", {-1, -1, -1, -1});
    const int64_t heads = x.size(2), dim = x.size(3);
    STD_TORCH_CHECK(heads > 0 && dim > 0, "x has shape ", shape_of(x),
                    ", expected heads and channels");
    check_affine(weight, "weight", x, "x", across_heads ? heads * dim : dim);
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin: expected both or neither");
    if (!cos) return;
    STD_TORCH_CHECK(dim % 2 == 0, "x has shape ", shape_of(x),
                    ", expected an even number of channels where cos and sin are given");
    check_float(*cos, "cos", x, "x", {x.size(1), dim / 2});
    check_float(*sin, "sin", x, "x", {x.size(1), dim / 2});
}

inline Tensor empty_float(const Tensor& x, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, shape, ScalarType::Float);
}

}  // namespace fastvideo::norm
