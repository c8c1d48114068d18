// SPDX-License-Identifier: Apache-2.0
// What every operator asks of its tensors; a refusal becomes a RuntimeError that names the
// argument.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace fastvideo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const char* name_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Bool:
            return "bool";
        default:
            return "another dtype";
    }
}

inline std::string shape_of(const Tensor& tensor) {
    std::string text = "(";
    for (int64_t i = 0; i < tensor.dim(); ++i)
        text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + ")";
}

// `tensor` has the sizes `shape`, where -1 stands for any.
inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> shape) {
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    std::string wanted = "(";
    int64_t i = 0;
    for (int64_t size : shape) {
        fits = fits && (size < 0 || tensor.size(i) == size);
        wanted += (i ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
        ++i;
    }
    STD_TORCH_CHECK(fits, name, " has shape ", shape_of(tensor), ", expected ", wanted, ")");
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " is ", name_of(tensor.scalar_type()),
                    ", expected ", name_of(dtype));
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other,
                              const char* other_name) {
    STD_TORCH_CHECK(tensor.device() == other.device(), name, " is on another device than ",
                    other_name);
}

// Kernels walk the last dimension as one run of memory; the others may have any stride.
inline bool has_dense_rows(const Tensor& tensor) {
    return tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1;
}
inline Tensor with_dense_rows(const Tensor& tensor) {
    return has_dense_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised tensor of the layout of `x` if that has dense rows, otherwise a contiguous one.
inline Tensor empty_rows_like(const Tensor& x) {
    Tensor like = torch::stable::empty_like(x);
    const bool dense = x.size(x.dim() - 1) <= 1 || like.stride(x.dim() - 1) == 1;
    return dense ? like : torch::stable::new_empty(x, x.sizes());
}

// The same for what may not have been given: (0,) then.
inline Tensor empty_rows_like(const OptionalTensor& vectors, const Tensor& x) {
    return vectors ? empty_rows_like(*vectors) : torch::stable::new_empty(x, {0});
}

}  // namespace fastvideo
