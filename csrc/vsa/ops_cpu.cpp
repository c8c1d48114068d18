// SPDX-License-Identifier: Apache-2.0
// The operators of Video Sparse Attention for CPU tensors: checks, then kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "vsa/checks.h"
#include "vsa/fine_cpu.h"
#include "vsa/index_cpu.h"

namespace fastvideo::vsa {

namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

static_assert(kTileTokens == kMostTileTokens && kMostChannels == kMostHeadDim);

Dtype dtype_of(ScalarType dtype) {
    return dtype == ScalarType::Float      ? Dtype::float32
           : dtype == ScalarType::BFloat16 ? Dtype::bfloat16
                                           : Dtype::float16;
}

Rows rows_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

const int32_t* ints_of(const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); }

OptionalTensor contiguous_or_none(const OptionalTensor& x) {
    return x ? OptionalTensor(contiguous(*x)) : std::nullopt;
}

// Tiles ascend, have 1 to 64 tokens each and stay within the tokens. `tiles` is contiguous.
const Tile* checked_tiles(const Tensor& tiles, const char* name, int64_t num_tokens) {
    static_assert(sizeof(Tile) == 2 * sizeof(int32_t));
    const auto* table = static_cast<const Tile*>(tiles.const_data_ptr());
    int64_t free = 0;
    for (int64_t i = 0; i < tiles.size(0); ++i) {
        const int64_t first = table[i].first, tokens = table[i].tokens;
        STD_TORCH_CHECK(tokens >= 1 && tokens <= kMostTileTokens, name, "[", i, "] has ", tokens,
                        " tokens, expected 1 to ", kMostTileTokens);
        STD_TORCH_CHECK(first >= free, name, "[", i, "] begins at token ", first,
                        ", expected tiles that ascend and do not overlap: at least ", free);
        free = first + tokens;
        STD_TORCH_CHECK(free <= num_tokens, name, "[", i, "] ends before token ", free,
                        ", expected at most ", num_tokens, ", the number of tokens");
    }
    return table;
}

// Counts fit the columns, and what they count are key tiles. Both are contiguous.
void check_index_values(const Tensor& index, const OptionalTensor& counts, int64_t num_kv_tiles) {
    const int32_t *chosen = ints_of(index), *num_chosen = counts ? ints_of(*counts) : nullptr;
    const int64_t k = index.size(3), num_rows = index.numel() / k;
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t count = num_chosen ? num_chosen[row] : k;
        STD_TORCH_CHECK(count >= 0 && count <= k, "counts holds ", count, ", expected 0 to ", k,
                        ", the columns of index");
        for (int64_t i = 0; i < count; ++i) {
            const int64_t tile = chosen[row * k + i];
            STD_TORCH_CHECK(tile >= 0 && tile < num_kv_tiles, "index holds ", tile,
                            ", expected 0 to ", num_kv_tiles - 1, ", one of the key tiles");
        }
    }
}

void check_inverse_values(const Tensor& offsets, const Tensor& rows, const Problem& problem) {
    const int64_t num_heads = static_cast<int64_t>(problem.batch) * problem.heads;
    const int64_t num_offsets = problem.num_kv_tiles + 1, num_rows = rows.size(2);
    for (int64_t head = 0; head < num_heads; ++head) {
        const int32_t* starts = ints_of(offsets) + head * num_offsets;
        STD_TORCH_CHECK(starts[0] == 0, "offsets begins with ", starts[0], ", expected 0");
        for (int64_t i = 1; i < num_offsets; ++i)
            STD_TORCH_CHECK(starts[i] >= starts[i - 1] && starts[i] <= num_rows, "offsets holds ",
                            starts[i], " after ", starts[i - 1],
                            ", expected to ascend and at most ", num_rows, ", the size of rows");
        for (int64_t i = 0; i < starts[num_offsets - 1]; ++i) {
            const int32_t tile = ints_of(rows)[head * num_rows + i];
            STD_TORCH_CHECK(tile >= 0 && tile < problem.num_q_tiles, "rows holds ", tile,
                            ", expected 0 to ", problem.num_q_tiles - 1,
                            ", one of the query tiles");
        }
    }
}

Tensor vsa_pool(Tensor x, Tensor tiles) {
    check_pool(x, tiles);
    x = with_dense_rows(x);
    tiles = contiguous(tiles);
    const int64_t heads = x.size(1), num_tiles = tiles.size(0), head_dim = x.size(3);
    const Tile* table = checked_tiles(tiles, "tiles", x.size(2));
    Tensor mean = new_empty(x, {x.size(0), heads, num_tiles, head_dim}, ScalarType::Float);
    auto* to = static_cast<float*>(mean.mutable_data_ptr());
    const Dtype dtype = dtype_of(x.scalar_type());
    const PoolKernels& kernels = FASTVIDEO_KERNELS(vsa_kernels).pool[static_cast<int>(dtype)];
    const Rows rows = rows_of(x);
    torch::stable::parallel_for(
        0, x.size(0) * heads * num_tiles, 4, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t head = i / num_tiles;
                kernels.pool(rows_of(rows, dtype, static_cast<int>(head / heads),
                                     static_cast<int>(head % heads)),
                             table[i % num_tiles], static_cast<int>(head_dim), to + i * head_dim);
            }
        });
    return mean;
}

Tensor vsa_pool_backward(Tensor grad, Tensor tiles, int64_t num_tokens, ScalarType to_dtype) {
    check_pool_backward(grad, tiles, num_tokens, to_dtype);
    grad = contiguous(grad);
    tiles = contiguous(tiles);
    const int64_t heads = grad.size(1), num_tiles = tiles.size(0), head_dim = grad.size(3);
    const Tile* table = checked_tiles(tiles, "tiles", num_tokens);
    Tensor out = new_empty(grad, {grad.size(0), heads, num_tokens, head_dim}, to_dtype);
    const auto* from = static_cast<const float*>(grad.const_data_ptr());
    const Dtype dtype = dtype_of(to_dtype);
    const PoolKernels& kernels = FASTVIDEO_KERNELS(vsa_kernels).pool[static_cast<int>(dtype)];
    const Rows rows = rows_of(out);
    torch::stable::parallel_for(
        0, grad.size(0) * heads * num_tiles, 4, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t head = i / num_tiles;
                const OwnedTile tile =
                    owned(table, static_cast<int>(num_tiles), static_cast<int>(num_tokens),
                          static_cast<int>(i % num_tiles));
                kernels.pool_backward(from + i * head_dim, tile, static_cast<int>(head_dim),
                                      rows_of(rows, dtype, static_cast<int>(head / heads),
                                              static_cast<int>(head % heads)));
            }
        });
    return out;
}

Tensor vsa_topk(Tensor scores, int64_t k) {
    check_topk(scores, k);
    scores = contiguous(scores);
    Tensor index =
        new_empty(scores, {scores.size(0), scores.size(1), scores.size(2), k}, ScalarType::Int);
    topk(static_cast<const float*>(scores.const_data_ptr()), index.numel() / k,
         static_cast<int>(scores.size(3)), static_cast<int>(k),
         static_cast<int32_t*>(index.mutable_data_ptr()));
    return index;
}

std::tuple<Tensor, Tensor> vsa_map_to_index(Tensor block_map) {
    check_map(block_map);
    block_map = contiguous(block_map);
    const int64_t batch = block_map.size(0), heads = block_map.size(1), q_tiles = block_map.size(2),
                  kv_tiles = block_map.size(3);
    Tensor index = new_empty(block_map, {batch, heads, q_tiles, kv_tiles}, ScalarType::Int);
    Tensor counts = new_empty(block_map, {batch, heads, q_tiles}, ScalarType::Int);
    map_to_index(static_cast<const bool*>(block_map.const_data_ptr()), counts.numel(),
                 static_cast<int>(kv_tiles), static_cast<int32_t*>(index.mutable_data_ptr()),
                 static_cast<int32_t*>(counts.mutable_data_ptr()));
    return {index, counts};
}

std::tuple<Tensor, Tensor> vsa_invert(Tensor index, OptionalTensor counts, int64_t num_kv_tiles) {
    check_invert(index, counts, num_kv_tiles);
    index = contiguous(index);
    counts = contiguous_or_none(counts);
    check_index_values(index, counts, num_kv_tiles);
    const int64_t batch = index.size(0), heads = index.size(1), q_tiles = index.size(2),
                  k = index.size(3);
    Tensor offsets = new_empty(index, {batch, heads, num_kv_tiles + 1}, ScalarType::Int);
    Tensor rows = new_empty(index, {batch, heads, q_tiles * k}, ScalarType::Int);
    invert(ints_of(index), counts ? ints_of(*counts) : nullptr, batch * heads,
           static_cast<int>(q_tiles), static_cast<int>(k), static_cast<int>(num_kv_tiles),
           static_cast<int32_t*>(offsets.mutable_data_ptr()),
           static_cast<int32_t*>(rows.mutable_data_ptr()));
    return {offsets, rows};
}

// Arguments of both passes in the form kernels read, kept alive while they run.
struct FineTensors {
    Tensor q, k, v, index, q_tiles, kv_tiles;
    OptionalTensor counts, coarse, gate;

    void prepare(Problem& problem) {
        check_fine(q, k, v, index, counts, q_tiles, kv_tiles, coarse, gate, problem);
        q = with_dense_rows(q);
        k = with_dense_rows(k);
        v = with_dense_rows(v);
        index = contiguous(index);
        q_tiles = contiguous(q_tiles);
        kv_tiles = contiguous(kv_tiles);
        counts = contiguous_or_none(counts);
        coarse = contiguous_or_none(coarse);
        if (gate) gate = with_dense_rows(*gate);
        problem.q_tiles = checked_tiles(q_tiles, "q_tiles", problem.num_q_tokens);
        problem.kv_tiles = checked_tiles(kv_tiles, "kv_tiles", problem.num_kv_tokens);
        check_index_values(index, counts, problem.num_kv_tiles);
        problem.index = ints_of(index);
        problem.counts = counts ? ints_of(*counts) : nullptr;
    }
};

std::tuple<Tensor, Tensor> vsa_fine_forward(Tensor q, Tensor k, Tensor v, Tensor index,
                                            OptionalTensor counts, Tensor q_tiles, Tensor kv_tiles,
                                            OptionalTensor coarse, OptionalTensor gate) {
    FineForward problem{};
    FineTensors x{q, k, v, index, q_tiles, kv_tiles, counts, coarse, gate};
    x.prepare(problem);
    Tensor out = empty_rows_like(q);
    Tensor lse = new_empty(x.q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    problem.q = rows_of(x.q);
    problem.k_rows = rows_of(x.k);
    problem.v = rows_of(x.v);
    if (x.gate) problem.gate = rows_of(*x.gate);
    if (x.coarse) problem.coarse = static_cast<const float*>(x.coarse->const_data_ptr());
    problem.out = rows_of(out);
    problem.lse = static_cast<float*>(lse.mutable_data_ptr());
    fine_forward(problem, dtype_of(q.scalar_type()));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vsa_fine_backward(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor index,
    OptionalTensor counts, Tensor offsets, Tensor rows, Tensor q_tiles, Tensor kv_tiles,
    OptionalTensor coarse, OptionalTensor gate) {
    FineBackward problem{};
    FineTensors x{q, k, v, index, q_tiles, kv_tiles, counts, coarse, gate};
    x.prepare(problem);
    check_fine_backward(grad, q, out, lse, offsets, rows, problem);
    grad = with_dense_rows(grad);
    out = with_dense_rows(out);
    lse = contiguous(lse);
    offsets = contiguous(offsets);
    rows = contiguous(rows);
    check_inverse_values(offsets, rows, problem);
    Tensor dq = empty_rows_like(q), dk = empty_rows_like(k), dv = empty_rows_like(v);
    Tensor dcoarse =
        coarse ? new_empty(*coarse, coarse->sizes()) : new_empty(q, {0}, ScalarType::Float);
    Tensor dgate = empty_rows_like(gate, q);
    problem.grad = rows_of(grad);
    problem.q = rows_of(x.q);
    problem.k_rows = rows_of(x.k);
    problem.v = rows_of(x.v);
    problem.out = rows_of(out);
    problem.lse = static_cast<const float*>(lse.const_data_ptr());
    problem.offsets = ints_of(offsets);
    problem.rows = ints_of(rows);
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
    fine_backward(problem, dtype_of(q.scalar_type()));
    return {dq, dk, dv, dcoarse, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastvideo, CPU, m) {
    m.impl("vsa_pool", TORCH_BOX(&vsa_pool));
    m.impl("vsa_pool_backward", TORCH_BOX(&vsa_pool_backward));
    m.impl("vsa_topk", TORCH_BOX(&vsa_topk));
    m.impl("vsa_map_to_index", TORCH_BOX(&vsa_map_to_index));
    m.impl("vsa_invert", TORCH_BOX(&vsa_invert));
    m.impl("vsa_fine_forward", TORCH_BOX(&vsa_fine_forward));
    m.impl("vsa_fine_backward", TORCH_BOX(&vsa_fine_backward));
}

}  // namespace fastvideo::vsa
