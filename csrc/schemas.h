// SPDX-License-Identifier: Apache-2.0
// The signatures of all operators, for the library proper and for the emulator's own namespace.
//
// Axes: B batch, H heads, S query tokens, N key tokens, D channels (of a head in vsa_*, of a token
// in norm_*), Q query tiles, K key tiles, k tiles selected for each query tile, G runs of
// consecutive tokens that share a modulation.
//
// A tile table is int32 (tiles, 2): first token and number of tokens, 1 to 64. Tiles ascend and do
// not overlap; tokens between two tiles are padding, which no kernel reads and outputs hold 0 for.
#pragma once

namespace fastvideo {

inline constexpr const char* kSchemas[] = {
    // (B,H,S,D) -> (B,H,tiles,D) float32 means of the tokens of each tile.
    "vsa_pool(Tensor x, Tensor tiles) -> Tensor",
    // Gradient (B,H,tiles,D) float32 -> (B,H,S,D) of `dtype`.
    "vsa_pool_backward(Tensor grad, Tensor tiles, int num_tokens, ScalarType dtype) -> Tensor",
    // float32 scores (B,H,Q,K) -> int32 (B,H,Q,k), ascending; equal scores: the lowest tile first.
    "vsa_topk(Tensor scores, int k) -> Tensor",
    // bool (B,H,Q,K) -> int32 index (B,H,Q,K), ascending and then zeros, and counts (B,H,Q).
    "vsa_map_to_index(Tensor block_map) -> (Tensor, Tensor)",
    // index (B,H,Q,k), counts (B,H,Q) or none if all of a row counts -> for each key tile the query
    // tiles that chose it, ascending: offsets int32 (B,H,K+1) into rows int32 (B,H,Q*k).
    "vsa_invert(Tensor index, Tensor? counts, int num_kv_tiles) -> (Tensor, Tensor)",
    // Softmax attention of each query tile to its key tiles, plus coarse (B,H,Q,D) float32 times
    // gate (B,H,S,D, without: 1) -> out (B,H,S,D), natural log-sum-exp (B,H,S) float32.
    "vsa_fine_forward(Tensor q, Tensor k, Tensor v, Tensor index, Tensor? counts, Tensor q_tiles, "
    "Tensor kv_tiles, Tensor? coarse, Tensor? gate) -> (Tensor, Tensor)",
    // -> gradients of q, k, v, coarse, gate; empty (0,) for what was not given.
    "vsa_fine_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor index, Tensor? counts, Tensor offsets, Tensor rows, Tensor q_tiles, Tensor kv_tiles, "
    "Tensor? coarse, Tensor? gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",

    // x (B,S,D); weight, bias (D,); scale, shift (B,G,D), S divisible by G, any of them float32 or
    // of x's dtype: y = (norm(x) * weight + bias) * (1 + scale) + shift, mean and rstd (B,S)
    // float32.
    "norm_layer_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    // -> gradients of x, weight, bias, scale, shift; empty (0,) for what was not given.
    "norm_layer_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    // residual + y * gate; gate (B,G,D).
    "norm_residual_gate_forward(Tensor residual, Tensor y, Tensor gate) -> Tensor",
    // -> gradients of y and gate; that of residual is `grad`.
    "norm_residual_gate_backward(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    // sum = residual + y * gate (without: y), rounded to its dtype; then norm_layer of it
    // -> sum, normed, mean, rstd.
    "norm_residual_layer_forward(Tensor residual, Tensor y, Tensor? gate, Tensor? weight, "
    "Tensor? bias, Tensor? scale, Tensor? shift, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    // -> gradients of residual, y (without gate it is that of residual, and (0,) here), gate,
    // weight,
    // bias, scale, shift.
    "norm_residual_layer_backward(Tensor grad_sum, Tensor grad, Tensor y, Tensor sum, Tensor mean, "
    "Tensor rstd, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    // x (B,S,H,D); over D with weight (D,), or over H*D with weight (H*D,) if `across_heads`; then,
    // where cos and sin float32 (S,D/2) of any strides are given, neighbouring pairs of channels
    // are
    // rotated.
    // -> out, rstd float32 (B,S,H), (B,S,1) if `across_heads`.
    "norm_rms_forward(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, bool across_heads, "
    "float eps) -> (Tensor, Tensor)",
    // -> gradients of x and weight.
    "norm_rms_backward(Tensor grad, Tensor x, Tensor rstd, Tensor? weight, Tensor? cos, "
    "Tensor? sin, bool across_heads) -> (Tensor, Tensor)",
};

}  // namespace fastvideo
