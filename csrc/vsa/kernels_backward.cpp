// SPDX-License-Identifier: Apache-2.0
// Backward pass of fine attention: five matrix products for each pair of a key tile and a query
// tile that chose it.
#include "vsa/kernels_backward.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

namespace {

template <class Unit>
struct PackedQuery {
    Unit *q, *grad;            // left factors, summed over channels
    Unit *q_rows, *grad_rows;  // right factors, summed over tokens
    float* dq;
    float *log2_sum, *delta;
    size_t bytes;

    PackedQuery(const Shapes<Unit>& shapes, std::byte* base) {
        Carver carver{base};
        q = carver.take<Unit>(shapes.left_size());
        grad = carver.take<Unit>(shapes.left_size());
        q_rows = carver.take<Unit>(shapes.rows_size());
        grad_rows = carver.take<Unit>(shapes.rows_size());
        dq = carver.take<float>(shapes.sums_size());
        log2_sum = carver.take<float>(kTileTokens);
        delta = carver.take<float>(kTileTokens);
        bytes = carver.used;
    }
};

template <class Unit>
struct KeyScratch {
    Unit *k, *v;   // right factors, summed over channels
    Unit* k_rows;  // summed over tokens
    float *dk, *dv;
    float *weights, *dscores;           // (queries, keys)
    Unit *weight_units, *dscore_units;  // as left factors summed over queries
    Unit* dscores_transposed;           // as a left factor summed over keys
    size_t bytes;

    KeyScratch(const Shapes<Unit>& shapes, std::byte* base) {
        Carver carver{base};
        k = carver.take<Unit>(shapes.transposed_size());
        v = carver.take<Unit>(shapes.transposed_size());
        k_rows = carver.take<Unit>(shapes.rows_size());
        dk = carver.take<float>(shapes.sums_size());
        dv = carver.take<float>(shapes.sums_size());
        weights = carver.take<float>(kScores);
        dscores = carver.take<float>(kScores);
        if constexpr (std::is_same_v<Unit, Pair>) {
            weight_units = carver.take<Unit>(kScores / 2);
            dscore_units = carver.take<Unit>(kScores / 2);
        } else {
            weight_units = weights;
            dscore_units = dscores;
        }
        dscores_transposed = carver.take<Unit>(kScores / kNumbers<Unit>);
        bytes = carver.used;
    }
};

// Sum over channels of grad * (out - coarse * gate); on the way the gradients of coarse and gate.
template <class T>
float delta_of(const vsa::QueryTile& query, int64_t token) {
    Floats sum{};
    const T* grad_row = row<T>(query.grad, token);
    const T* out_row = row<T>(query.out, token);
    for_vectors(query.head_dim, [&](int channel, int count) {
        const Floats grad = load_some(grad_row + channel, count);
        Floats fine = load_some(out_row + channel, count);
        if (query.coarse != nullptr) {
            const Floats coarse = load_some(query.coarse + channel, count);
            Floats gate = splat(1.0f);
            if (query.gate.data != nullptr) {
                gate = load_some(row<T>(query.gate, token) + channel, count);
                store_some(mutable_row<T>(query.dgate, token) + channel, grad * coarse, count);
            }
            fine -= coarse * gate;
            float* dcoarse = query.dcoarse + channel;
            store_some(dcoarse, load_some(dcoarse, count) + grad * gate, count);
        }
        sum += grad * fine;
    });
    return sum_of(sum);
}

// weights and dscores of the softmax from scores and the gradient of weights, in place.
template <class Unit>
void differentiate(const KeyScratch<Unit>& key, const PackedQuery<Unit>& query, int queries,
                   int keys, float scale) {
    for (int i = 0; i < queries; ++i) {
        const Floats log2_sum = splat(query.log2_sum[i]), delta = splat(query.delta[i]);
        float* weights = key.weights + i * kLeftWidth;
        float* dscores = key.dscores + i * kLeftWidth;
        for (int j = 0; j < keys; j += kWidth) {
            const Floats weight = exp2(load(weights + j) * scale - log2_sum);
            store(weights + j, weight);
            store(dscores + j, weight * (load(dscores + j) - delta));
        }
    }
}

// The two forms of pairs of dscores and the one of weights. Halves without a token are zero.
inline void pair_up(const KeyScratch<Pair>& key, int queries, int keys) {
    alignas(64) BFloat16 rounded[kTileTokens * kLeftWidth];
    const Panels left{kLeftWidth, Shapes<Pair>::kTokenSteps};
    const auto round = [&](const float* from) {
        for (int i = 0; i < queries; ++i)
            for (int j = 0; j < keys; j += kWidth)
                store(rounded + i * kLeftWidth + j, load(from + i * kLeftWidth + j));
    };
    round(key.weights);
    pack_rows(rounded, kLeftWidth, queries, keys, key.weight_units, left);
    round(key.dscores);
    pack_rows(rounded, kLeftWidth, queries, keys, key.dscore_units, left);
    pack_transposed(rounded, kLeftWidth, queries, keys, key.dscores_transposed, left);
}
inline void pair_up(const KeyScratch<float>& key, int queries, int keys) {
    pack_transposed(key.dscores, kLeftWidth, queries, keys, key.dscores_transposed,
                    Panels{kLeftWidth, Shapes<float>::kTokenSteps});
}

template <class T>
void write_scaled(const float* sums, int stride, const OwnedTile& tile, int channels, float scale,
                  const HeadRows& to) {
    for (int i = 0; i < tile.tokens; ++i) {
        T* out = mutable_row<T>(to, tile.first + i);
        for_vectors(channels, [&](int channel, int count) {
            store_some(out + channel, load(sums + i * stride + channel) * scale, count);
        });
    }
    zero_padding<T>(to, tile, channels);
}

}  // namespace

template <class T>
size_t query_bytes(int head_dim) {
    return PackedQuery<UnitOf<T>>({head_dim}, nullptr).bytes;
}

template <class T>
size_t backward_bytes(int head_dim) {
    return KeyScratch<UnitOf<T>>({head_dim}, nullptr).bytes;
}

template <class T>
void begin_query(const vsa::QueryTile& query) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{query.head_dim};
    const PackedQuery<Unit> to(shapes, query.packed);
    const int tokens = query.tile.tokens, channels = query.head_dim;
    const int64_t first = query.tile.first;
    const T *q = row<T>(query.q, first), *grad = row<T>(query.grad, first);
    pack_transposed(q, query.q.token, tokens, channels, to.q, shapes.left());
    pack_transposed(grad, query.grad.token, tokens, channels, to.grad, shapes.left());
    pack_rows(q, query.q.token, tokens, channels, to.q_rows, shapes.rows());
    pack_rows(grad, query.grad.token, tokens, channels, to.grad_rows, shapes.rows());
    std::memset(to.dq, 0, shapes.sums_size() * sizeof(float));
    if (query.dcoarse != nullptr) std::memset(query.dcoarse, 0, channels * sizeof(float));
    for (int i = 0; i < tokens; ++i) {
        to.delta[i] = delta_of<T>(query, first + i);
        to.log2_sum[i] = query.lse[first + i] * kLog2e;
    }
    if (query.dgate.data != nullptr) zero_padding<T>(query.dgate, query.tile, channels);
}

template <class T>
void begin_key(const vsa::KeyTile& key) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{key.head_dim};
    const KeyScratch<Unit> to(shapes, key.scratch);
    const int tokens = key.tile.tokens, channels = key.head_dim;
    const T *k = row<T>(key.k, key.tile.first), *v = row<T>(key.v, key.tile.first);
    pack_transposed(k, key.k.token, tokens, channels, to.k, shapes.transposed());
    pack_transposed(v, key.v.token, tokens, channels, to.v, shapes.transposed());
    pack_rows(k, key.k.token, tokens, channels, to.k_rows, shapes.rows());
    std::memset(to.dk, 0, shapes.sums_size() * sizeof(float));
    std::memset(to.dv, 0, shapes.sums_size() * sizeof(float));
}

template <class T>
void pair(const vsa::KeyTile& key, const vsa::QueryTile& query) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{key.head_dim};
    const KeyScratch<Unit> to(shapes, key.scratch);
    const PackedQuery<Unit> from(shapes, query.packed);
    const int queries = query.tile.tokens, keys = key.tile.tokens, channels = key.head_dim;
    const int channel_steps = shapes.channel_steps(), query_steps = steps<Unit>(queries);
    constexpr int kTokenSteps = Shapes<Unit>::kTokenSteps;
    multiply(from.q, kLeftWidth, to.k, channel_steps, channel_steps, queries, keys, to.weights,
             kLeftWidth);
    multiply(from.grad, kLeftWidth, to.v, channel_steps, channel_steps, queries, keys, to.dscores,
             kLeftWidth);
    differentiate(to, from, queries, keys, softmax_scale(channels) * kLog2e);
    pair_up(to, queries, keys);
    const int width = shapes.row_width();
    multiply_add(to.weight_units, kLeftWidth, from.grad_rows, kTokenSteps, query_steps, keys,
                 channels, to.dv, width);
    multiply_add(to.dscore_units, kLeftWidth, from.q_rows, kTokenSteps, query_steps, keys, channels,
                 to.dk, width);
}

template <class T>
void add_dq(const vsa::KeyTile& key, const vsa::QueryTile& query) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{key.head_dim};
    const KeyScratch<Unit> from(shapes, key.scratch);
    const PackedQuery<Unit> to(shapes, query.packed);
    multiply_add(from.dscores_transposed, kLeftWidth, from.k_rows, Shapes<Unit>::kTokenSteps,
                 steps<Unit>(key.tile.tokens), query.tile.tokens, key.head_dim, to.dq,
                 shapes.row_width());
}

template <class T>
void end_key(const vsa::KeyTile& key) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{key.head_dim};
    const KeyScratch<Unit> from(shapes, key.scratch);
    const int width = shapes.row_width();
    write_scaled<T>(from.dk, width, key.tile, key.head_dim, softmax_scale(key.head_dim), key.dk);
    write_scaled<T>(from.dv, width, key.tile, key.head_dim, 1.0f, key.dv);
}

template <class T>
void end_query(const vsa::QueryTile& query) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{query.head_dim};
    const PackedQuery<Unit> from(shapes, query.packed);
    write_scaled<T>(from.dq, shapes.row_width(), query.tile, query.head_dim,
                    softmax_scale(query.head_dim), query.dq);
}

#define FASTVIDEO_BACKWARD(T)                                            \
    template size_t query_bytes<T>(int);                                 \
    template size_t backward_bytes<T>(int);                              \
    template void begin_query<T>(const vsa::QueryTile&);                 \
    template void begin_key<T>(const vsa::KeyTile&);                     \
    template void pair<T>(const vsa::KeyTile&, const vsa::QueryTile&);   \
    template void add_dq<T>(const vsa::KeyTile&, const vsa::QueryTile&); \
    template void end_key<T>(const vsa::KeyTile&);                       \
    template void end_query<T>(const vsa::QueryTile&)
FASTVIDEO_BACKWARD(float);
FASTVIDEO_BACKWARD(BFloat16);
FASTVIDEO_BACKWARD(Float16);

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
