// SPDX-License-Identifier: Apache-2.0
// What the operators of Video Sparse Attention ask of their arguments, on any device: everything
// but the values that tensors hold.
#pragma once

#include <cstdint>
#include <limits>

#include "tensor.h"
#include "vsa/fine.h"

namespace fastvideo::vsa {

inline constexpr int64_t kMostTileTokens = 64;
inline constexpr int64_t kMostHeadDim = 256;

inline void check_float_dtype(const Tensor& tensor, const char* name) {
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        name, " is ", name_of(dtype), ", expected float32, bfloat16 or float16");
}

// Axes are counted in int32, where there is at least one of everything.
inline void check_axes(const Tensor& tensor, const char* name, int64_t axes) {
    STD_TORCH_CHECK(tensor.dim() == axes, name, " has shape ", shape_of(tensor), ", expected ",
                    axes, " axes");
    for (int64_t i = 0; i < axes; ++i)
        STD_TORCH_CHECK(tensor.size(i) > 0 && tensor.size(i) < std::numeric_limits<int32_t>::max(),
                        name, " has shape ", shape_of(tensor),
                        ", expected sizes from 1 to 2^31 - 2");
}

// (B,H,S,D) of attention.
inline void check_heads(const Tensor& x, const char* name) {
    check_axes(x, name, 4);
    check_float_dtype(x, name);
    STD_TORCH_CHECK(x.size(3) <= kMostHeadDim, name, " has ", x.size(3),
                    " channels in a head, expected at most ", kMostHeadDim);
}

inline void check_tiles(const Tensor& tiles, const char* name, const Tensor& x,
                        const char* x_name) {
    check_axes(tiles, name, 2);
    check_shape(tiles, name, {-1, 2});
    check_dtype(tiles, name, ScalarType::Int);
    check_same_device(tiles, name, x, x_name);
}

// `tensor` goes with `like`: dtype, device and all sizes.
inline void check_like(const Tensor& tensor, const char* name, const Tensor& like,
                       const char* like_name) {
    check_shape(tensor, name, {like.size(0), like.size(1), like.size(2), like.size(3)});
    check_dtype(tensor, name, like.scalar_type());
    check_same_device(tensor, name, like, like_name);
}

inline void check_pool(const Tensor& x, const Tensor& tiles) {
    check_heads(x, "x");
    check_tiles(tiles, "tiles", x, "x");
}

inline void check_pool_backward(const Tensor& grad, const Tensor& tiles, int64_t num_tokens,
                                ScalarType dtype) {
    check_heads(grad, "grad");
    check_dtype(grad, "grad", ScalarType::Float);
    check_tiles(tiles, "tiles", grad, "grad");
    check_shape(grad, "grad", {-1, -1, tiles.size(0), -1});
    STD_TORCH_CHECK(num_tokens > 0 && num_tokens < std::numeric_limits<int32_t>::max(),
                    "num_tokens is ", num_tokens, ", expected 1 to 2^31 - 2");
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "dtype is ", name_of(dtype), ", expected float32, bfloat16 or float16");
}

inline void check_topk(const Tensor& scores, int64_t k) {
    check_axes(scores, "scores", 4);
    check_dtype(scores, "scores", ScalarType::Float);
    STD_TORCH_CHECK(k >= 1 && k <= scores.size(3), "k is ", k, ", expected 1 to ", scores.size(3),
                    ", the number of key tiles");
}

inline void check_map(const Tensor& block_map) {
    check_axes(block_map, "block_map", 4);
    check_dtype(block_map, "block_map", ScalarType::Bool);
}

inline void check_index(const Tensor& index, const OptionalTensor& counts, int64_t num_kv_tiles) {
    check_axes(index, "index", 4);
    check_dtype(index, "index", ScalarType::Int);
    STD_TORCH_CHECK(index.size(3) <= num_kv_tiles, "index has shape ", shape_of(index),
                    ", expected at most as many columns as key tiles, ", num_kv_tiles);
    // Entries (B,H,Q,k) of one head are counted in int32.
    STD_TORCH_CHECK(index.size(2) * index.size(3) < std::numeric_limits<int32_t>::max(),
                    "index has shape ", shape_of(index), ", expected Q * k below 2^31 - 1");
    if (!counts) return;
    check_shape(*counts, "counts", {index.size(0), index.size(1), index.size(2)});
    check_dtype(*counts, "counts", ScalarType::Int);
    check_same_device(*counts, "counts", index, "index");
}

inline void check_invert(const Tensor& index, const OptionalTensor& counts, int64_t num_kv_tiles) {
    STD_TORCH_CHECK(num_kv_tiles >= 1 && num_kv_tiles < std::numeric_limits<int32_t>::max() - 1,
                    "num_kv_tiles is ", num_kv_tiles, ", expected 1 to 2^31 - 3");
    check_index(index, counts, num_kv_tiles);
}

// The arguments that both passes of fine attention have; fills the sizes.
inline void check_fine(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& index,
                       const OptionalTensor& counts, const Tensor& q_tiles, const Tensor& kv_tiles,
                       const OptionalTensor& coarse, const OptionalTensor& gate, Problem& problem) {
    check_heads(q, "q");
    const int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(3);
    check_axes(k, "k", 4);
    check_shape(k, "k", {batch, heads, -1, head_dim});
    check_dtype(k, "k", q.scalar_type());
    check_same_device(k, "k", q, "q");
    check_like(v, "v", k, "k");
    check_tiles(q_tiles, "q_tiles", q, "q");
    check_tiles(kv_tiles, "kv_tiles", q, "q");
    check_shape(index, "index", {batch, heads, q_tiles.size(0), -1});
    check_index(index, counts, kv_tiles.size(0));
    check_same_device(index, "index", q, "q");
    if (coarse) {
        check_shape(*coarse, "coarse", {batch, heads, q_tiles.size(0), head_dim});
        check_dtype(*coarse, "coarse", ScalarType::Float);
        check_same_device(*coarse, "coarse", q, "q");
    }
    if (gate) {
        STD_TORCH_CHECK(coarse.has_value(), "gate is given without coarse, which it multiplies");
        check_like(*gate, "gate", q, "q");
    }
    problem.batch = static_cast<int>(batch);
    problem.heads = static_cast<int>(heads);
    problem.head_dim = static_cast<int>(head_dim);
    problem.num_q_tokens = static_cast<int>(q.size(2));
    problem.num_kv_tokens = static_cast<int>(k.size(2));
    problem.num_q_tiles = static_cast<int>(q_tiles.size(0));
    problem.num_kv_tiles = static_cast<int>(kv_tiles.size(0));
    problem.k = static_cast<int>(index.size(3));
    problem.is_bf16 = q.scalar_type() == ScalarType::BFloat16;
}

// What the backward pass has besides; call check_fine first.
inline void check_fine_backward(const Tensor& grad, const Tensor& q, const Tensor& out,
                                const Tensor& lse, const Tensor& offsets, const Tensor& rows,
                                const Problem& problem) {
    check_like(grad, "grad", q, "q");
    check_like(out, "out", q, "q");
    check_shape(lse, "lse", {problem.batch, problem.heads, problem.num_q_tokens});
    check_dtype(lse, "lse", ScalarType::Float);
    check_same_device(lse, "lse", q, "q");
    check_shape(offsets, "offsets", {problem.batch, problem.heads, problem.num_kv_tiles + 1});
    check_dtype(offsets, "offsets", ScalarType::Int);
    check_same_device(offsets, "offsets", q, "q");
    check_shape(
        rows, "rows",
        {problem.batch, problem.heads, static_cast<int64_t>(problem.num_q_tiles) * problem.k});
    check_dtype(rows, "rows", ScalarType::Int);
    check_same_device(rows, "rows", q, "q");
}

}  // namespace fastvideo::vsa
