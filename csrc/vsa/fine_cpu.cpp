// SPDX-License-Identifier: Apache-2.0
#include "vsa/fine_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace fastvideo::vsa {

namespace {

using torch::stable::parallel_for;

struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte[], Free>;

Memory allocate(size_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    return Memory(static_cast<std::byte*>(memory));
}

// Heads whose packed tiles are in memory together: one keeps to the last cache, more of small ones
// give all threads work.
constexpr size_t kPackedBytes = size_t{8} << 20;

int heads_at_a_time(size_t bytes_per_head, int num_heads) {
    return static_cast<int>(
        std::clamp<size_t>(kPackedBytes / bytes_per_head, 1, static_cast<size_t>(num_heads)));
}

struct Head {
    int batch, head;
    int64_t number;

    Head(const Problem& problem, int64_t number)
        : batch(static_cast<int>(number / problem.heads)),
          head(static_cast<int>(number % problem.heads)),
          number(number) {}
};

}  // namespace

void fine_forward(const FineForward& problem, Dtype dtype) {
    const FineKernels& kernels = FASTVIDEO_KERNELS(vsa_kernels).fine[static_cast<int>(dtype)];
    const int head_dim = problem.head_dim;
    const int64_t num_q = problem.num_q_tiles, num_kv = problem.num_kv_tiles;
    const int num_heads = problem.batch * problem.heads;
    const size_t kv_bytes = kernels.kv_bytes(head_dim), head_bytes = kv_bytes * num_kv;
    const int group = heads_at_a_time(head_bytes, num_heads);
    const Memory packed = allocate(head_bytes * group);

    for (int first = 0; first < num_heads; first += group) {
        const int64_t heads = std::min(group, num_heads - first);
        parallel_for(0, heads * num_kv, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const Head head(problem, first + i / num_kv);
                kernels.pack_kv(head_dim, rows_of(problem.k_rows, dtype, head.batch, head.head),
                                rows_of(problem.v, dtype, head.batch, head.head),
                                problem.kv_tiles[i % num_kv], packed.get() + i * kv_bytes);
            }
        });
        parallel_for(0, heads * num_q, 1, [&](int64_t begin, int64_t end) {
            const Memory scratch = allocate(kernels.forward_bytes(head_dim));
            for (int64_t i = begin; i < end; ++i) {
                const Head head(problem, first + i / num_q);
                const int q_tile = static_cast<int>(i % num_q);
                const int64_t row = head.number * num_q + q_tile;
                ForwardTile work{};
                work.head_dim = head_dim;
                work.q = rows_of(problem.q, dtype, head.batch, head.head);
                work.gate = rows_of(problem.gate, dtype, head.batch, head.head);
                work.out = rows_of(problem.out, dtype, head.batch, head.head);
                work.coarse = problem.coarse ? problem.coarse + row * head_dim : nullptr;
                work.lse = problem.lse + head.number * problem.num_q_tokens;
                work.tile =
                    owned(problem.q_tiles, problem.num_q_tiles, problem.num_q_tokens, q_tile);
                work.chosen = problem.index + row * problem.k;
                work.num_chosen = problem.counts ? problem.counts[row] : problem.k;
                work.kv_tiles = problem.kv_tiles;
                work.packed = packed.get() + i / num_q * head_bytes;
                kernels.forward(work, scratch.get());
            }
        });
    }
}

namespace {

// Lets the pairs of a query tile add to its dq in ascending order of key tiles, whichever threads
// they are on, so that sums do not depend on the number of threads.
class Turns {
  public:
    // For lists of query tiles, as in rows and offsets of `invert`.
    Turns(const int32_t* offsets, const int32_t* rows, int64_t num_kv_tiles, int64_t num_q_tiles)
        : done_(num_q_tiles), turns_(offsets[num_kv_tiles]) {
        std::vector<int32_t> next(num_q_tiles);
        for (size_t i = 0; i < turns_.size(); ++i) turns_[i] = next[rows[i]]++;
    }

    // Waits until entry `i` of rows, which is `q_tile`, may add.
    void await(int32_t i, int32_t q_tile) const {
        const auto& done = done_[q_tile];
        for (int32_t now; (now = done.load(std::memory_order_acquire)) != turns_[i];)
            done.wait(now, std::memory_order_acquire);
    }
    void pass_on(int32_t q_tile) {
        done_[q_tile].fetch_add(1, std::memory_order_release);
        done_[q_tile].notify_all();
    }

  private:
    std::vector<std::atomic<int32_t>> done_;
    std::vector<int32_t> turns_;
};

}  // namespace

// One pass over key tiles with five products for a pair, not two passes with seven: dk and dv stay
// with the thread of the key tile, dq is summed in float32 memory of the whole head, in turns.
// Key tiles are taken in ascending order and wait for lower ones only, so that the lowest one in
// work never waits.
void fine_backward(const FineBackward& problem, Dtype dtype) {
    const FineKernels& kernels = FASTVIDEO_KERNELS(vsa_kernels).fine[static_cast<int>(dtype)];
    const int head_dim = problem.head_dim;
    const int64_t num_q = problem.num_q_tiles, num_kv = problem.num_kv_tiles;
    const int num_heads = problem.batch * problem.heads;
    const size_t query_bytes = kernels.query_bytes(head_dim), head_bytes = query_bytes * num_q;
    const size_t scratch_bytes = kernels.backward_bytes(head_dim);
    const int group = heads_at_a_time(head_bytes, num_heads);
    const int64_t num_threads = torch::stable::get_num_threads();
    const Memory packed = allocate(head_bytes * group);
    const Memory scratch = allocate(scratch_bytes * num_threads);

    const auto query_of = [&](const Head& head, int64_t slot, int q_tile) {
        const int64_t row = head.number * num_q + q_tile;
        QueryTile query{};
        query.head_dim = head_dim;
        query.grad = rows_of(problem.grad, dtype, head.batch, head.head);
        query.q = rows_of(problem.q, dtype, head.batch, head.head);
        query.out = rows_of(problem.out, dtype, head.batch, head.head);
        query.gate = rows_of(problem.gate, dtype, head.batch, head.head);
        query.dq = rows_of(problem.dq, dtype, head.batch, head.head);
        query.dgate = rows_of(problem.dgate, dtype, head.batch, head.head);
        query.coarse = problem.coarse ? problem.coarse + row * head_dim : nullptr;
        query.dcoarse = problem.dcoarse ? problem.dcoarse + row * head_dim : nullptr;
        query.lse = problem.lse + head.number * problem.num_q_tokens;
        query.tile = owned(problem.q_tiles, problem.num_q_tiles, problem.num_q_tokens, q_tile);
        query.packed = packed.get() + slot * head_bytes + q_tile * query_bytes;
        return query;
    };

    for (int first = 0; first < num_heads; first += group) {
        const int64_t heads = std::min(group, num_heads - first);
        const auto for_queries = [&](auto use) {
            parallel_for(0, heads * num_q, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i)
                    use(query_of({problem, first + i / num_q}, i / num_q,
                                 static_cast<int>(i % num_q)));
            });
        };
        for_queries(kernels.begin_query);

        std::vector<std::unique_ptr<Turns>> turns;
        for (int64_t head = first; head < first + heads; ++head)
            turns.push_back(std::make_unique<Turns>(problem.offsets + head * (num_kv + 1),
                                                    problem.rows + head * num_q * problem.k, num_kv,
                                                    num_q));
        std::atomic<int64_t> next = 0;
        parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t) {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < heads * num_kv;) {
                const int64_t slot = i / num_kv;
                const int kv_tile = static_cast<int>(i % num_kv);
                const Head head(problem, first + slot);
                KeyTile key{};
                key.head_dim = head_dim;
                key.k = rows_of(problem.k_rows, dtype, head.batch, head.head);
                key.v = rows_of(problem.v, dtype, head.batch, head.head);
                key.dk = rows_of(problem.dk, dtype, head.batch, head.head);
                key.dv = rows_of(problem.dv, dtype, head.batch, head.head);
                key.tile =
                    owned(problem.kv_tiles, problem.num_kv_tiles, problem.num_kv_tokens, kv_tile);
                key.scratch = scratch.get() + begin * scratch_bytes;
                kernels.begin_key(key);
                const int32_t* offsets = problem.offsets + head.number * (num_kv + 1);
                const int32_t* rows = problem.rows + head.number * num_q * problem.k;
                for (int32_t entry = offsets[kv_tile]; entry < offsets[kv_tile + 1]; ++entry) {
                    const int32_t q_tile = rows[entry];
                    const QueryTile query = query_of(head, slot, q_tile);
                    kernels.pair(key, query);
                    turns[slot]->await(entry, q_tile);
                    kernels.add_dq(key, query);
                    turns[slot]->pass_on(q_tile);
                }
                kernels.end_key(key);
            }
        });
        for_queries(kernels.end_query);
    }
}

}  // namespace fastvideo::vsa
