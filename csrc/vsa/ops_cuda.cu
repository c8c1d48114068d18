// SPDX-License-Identifier: Apache-2.0
// The operators of the fine attention for CUDA tensors: checks, then the kernels that suit the
// device. Values of tensors are not looked at, which would wait for the device; kernels bring what
// they read from tables and lists into range.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>
#include <tuple>

#include "vsa/checks.h"
#include "vsa/fine_cuda.h"

namespace fastvideo::vsa {

namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// FASTVIDEO_VSA_KERNEL: auto (or nothing), mma, wgmma. Read at each call, as tests change it.
bool by_wgmma() {
    const int capability = cuda::compute_capability();
    STD_TORCH_CHECK(capability >= 80, "the device has compute capability ", capability / 10, ".",
                    capability % 10, ", expected 8.0 or more");
#ifdef FASTVIDEO_SM90
    const bool possible = capability == 90;
#else
    const bool possible = false;
#endif
    const char* set = std::getenv("FASTVIDEO_VSA_KERNEL");
    const std::string asked = set && *set ? set : "auto";
    if (asked == "auto") return possible;
    if (asked == "mma") return false;
    STD_TORCH_CHECK(asked == "wgmma", "FASTVIDEO_VSA_KERNEL=", asked, ": use auto, mma or wgmma");
    STD_TORCH_CHECK(possible,
                    "FASTVIDEO_VSA_KERNEL=wgmma: this needs a device of compute "
                    "capability 9.0 and a build for it");
    return true;
}

void forward(const FineForward& problem, cuda::Stream stream) {
    [[maybe_unused]] const bool wgmma = by_wgmma();
#ifdef FASTVIDEO_SM90
    if (wgmma) return forward_sm90(problem, stream);
#endif
    forward_mma(problem, stream);
}

void backward(const FineBackward& problem, cuda::Stream stream) {
    [[maybe_unused]] const bool wgmma = by_wgmma();
#ifdef FASTVIDEO_SM90
    if (wgmma) return backward_sm90(problem, stream);
#endif
    backward_mma(problem, stream);
}

// Kernels copy 16 bytes at a time and count strides in 32 bits; a tensor map has no stride of 0.
bool has_aligned_rows(const Tensor& x) {
    constexpr int64_t kChunk = 8;
    for (int axis = 0; axis < 3; ++axis)
        if (x.stride(axis) % kChunk || (x.stride(axis) == 0 && x.size(axis) > 1)) return false;
    return x.stride(3) == 1 && x.stride(2) < kMostTokenStride &&
           reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

Tensor with_aligned_rows(const Tensor& x) {
    if (has_aligned_rows(x)) return x;
    Tensor copy = new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    torch::stable::copy_(copy, x);
    return copy;
}

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

const int32_t* ints_of(const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); }

const Tile* tiles_of(const Tensor& x) { return static_cast<const Tile*>(x.const_data_ptr()); }

// Contiguous, and where kernels may load two numbers at once: a view may begin at an odd one.
Tensor contiguous_pairs(const Tensor& x) {
    Tensor dense = contiguous(x);
    const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 8 == 0;
    return aligned ? dense : torch::stable::clone(dense);
}

OptionalTensor contiguous_or_none(const OptionalTensor& x) {
    return x ? OptionalTensor(contiguous(*x)) : std::nullopt;
}

// Arguments of both passes in the form kernels read, kept alive while they are put to work.
struct FineTensors {
    Tensor q, k, v, index, q_tiles, kv_tiles;
    OptionalTensor counts, coarse, gate;

    void prepare(Problem& problem) {
        check_fine(q, k, v, index, counts, q_tiles, kv_tiles, coarse, gate, problem);
        const ScalarType dtype = q.scalar_type();
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "q is ",
                        name_of(dtype), ", expected bfloat16 or float16 on CUDA");
        STD_TORCH_CHECK(problem.head_dim == 64 || problem.head_dim == 128, "q has ",
                        problem.head_dim, " channels in a head, expected 64 or 128 on CUDA");
        q = with_aligned_rows(q);
        k = with_aligned_rows(k);
        v = with_aligned_rows(v);
        index = contiguous(index);
        q_tiles = contiguous_pairs(q_tiles);
        kv_tiles = contiguous_pairs(kv_tiles);
        counts = contiguous_or_none(counts);
        if (coarse) coarse = contiguous_pairs(*coarse);
        if (gate) gate = with_aligned_rows(*gate);
        problem.q_tiles = tiles_of(q_tiles);
        problem.kv_tiles = tiles_of(kv_tiles);
        problem.index = ints_of(index);
        problem.counts = counts ? ints_of(*counts) : nullptr;
    }
};

std::tuple<Tensor, Tensor> vsa_fine_forward(Tensor q, Tensor k, Tensor v, Tensor index,
                                            OptionalTensor counts, Tensor q_tiles, Tensor kv_tiles,
                                            OptionalTensor coarse, OptionalTensor gate) {
    const cuda::OnDeviceOf device(q);
    FineForward problem{};
    FineTensors x{q, k, v, index, q_tiles, kv_tiles, counts, coarse, gate};
    x.prepare(problem);
    Tensor out = empty_rows_like(q);
    Tensor lse = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    problem.q = rows_of(x.q);
    problem.k_rows = rows_of(x.k);
    problem.v = rows_of(x.v);
    if (x.gate) problem.gate = rows_of(*x.gate);
    if (x.coarse) problem.coarse = static_cast<const float*>(x.coarse->const_data_ptr());
    problem.out = rows_of(out);
    problem.lse = static_cast<float*>(lse.mutable_data_ptr());
    forward(problem, device.stream());
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vsa_fine_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor index,
    OptionalTensor counts, Tensor offsets, Tensor rows, Tensor q_tiles, Tensor kv_tiles,
    OptionalTensor coarse, OptionalTensor gate) {
    const cuda::OnDeviceOf device(q);
    FineBackward problem{};
    FineTensors x{q, k, v, index, q_tiles, kv_tiles, counts, coarse, gate};
    x.prepare(problem);
    check_fine_backward(grad, q, out, lse, offsets, rows, problem);
    grad = with_aligned_rows(grad);
    out = with_aligned_rows(out);
    lse = contiguous(lse);
    offsets = contiguous(offsets);
    rows = contiguous(rows);
    Tensor dq = empty_rows_like(q), dk = empty_rows_like(k), dv = empty_rows_like(v);
    Tensor dcoarse =
        coarse ? new_empty(*coarse, coarse->sizes()) : new_empty(q, {0}, ScalarType::Float);
    Tensor dgate = empty_rows_like(gate, q);
    Tensor delta = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    problem.grad = rows_of(grad);
    problem.q = rows_of(x.q);
    problem.k_rows = rows_of(x.k);
    problem.v = rows_of(x.v);
    problem.out = rows_of(out);
    problem.lse = static_cast<const float*>(lse.const_data_ptr());
    problem.offsets = ints_of(offsets);
    problem.rows = ints_of(rows);
    problem.delta = static_cast<float*>(delta.mutable_data_ptr());
    problem.dq = rows_of(dq);
    problem.dk = rows_of(dk);
    problem.dv = rows_of(dv);
    if (x.coarse) {
        problem.coarse = static_cast<const float*>(x.coarse->const_data_ptr());
        problem.dcoarse = static_cast<float*>(dcoarse.mutable_data_ptr());
    }
    if (x.gate) {
        problem.gate = rows_of(*x.gate);
        problem.dgate = rows_of(dgate);
    }
    backward(problem, device.stream());
    return {dq, dk, dv, dcoarse, dgate};
}

}  // namespace

FASTVIDEO_CUDA_IMPL(m) {
    m.impl("vsa_fine_forward", TORCH_BOX(&vsa_fine_forward));
    m.impl("vsa_fine_backward", TORCH_BOX(&vsa_fine_backward));
}

}  // namespace fastvideo::vsa
