// SPDX-License-Identifier: Apache-2.0
// Forward pass of fine attention: one query tile against the packed key tiles it chose.
//
// Scores are kept transposed, a row for each key and a lane for each query: then maxima and sums
// need no shuffles, a ragged key tile costs no masks, and they are the left factor of P V as is.
#include "vsa/kernels_forward.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

namespace {

// A query's scores may outgrow the maximum they are reduced by by this power of two before its sums
// are rescaled: float32 and bfloat16 keep their relative precision, and rescaling becomes rare.
constexpr float kSlack = 8.0f;

template <class Unit>
struct PackedKv {
    Unit *k, *v;
    size_t bytes;

    PackedKv(const Shapes<Unit>& shapes, std::byte* base) {
        Carver carver{base};
        k = carver.take<Unit>(shapes.left_size());
        v = carver.take<Unit>(shapes.rows_size());
        bytes = carver.used;
    }
};

template <class Unit>
struct Scratch {
    Unit* q;
    float* scores;
    Pair* weights;  // where they are multiplied as pairs
    float* sums;    // (tokens, row_width): the output before division
    float *reference, *total, *rescale;
    size_t bytes;

    Scratch(const Shapes<Unit>& shapes, std::byte* base) {
        Carver carver{base};
        q = carver.take<Unit>(shapes.transposed_size());
        scores = carver.take<float>(kScores);
        weights = carver.take<Pair>(std::is_same_v<Unit, Pair> ? kScores / 2 : 0);
        sums = carver.take<float>(shapes.sums_size());
        reference = carver.take<float>(kTileTokens);
        total = carver.take<float>(kTileTokens);
        rescale = carver.take<float>(kTileTokens);
        bytes = carver.used;
    }
};

// Turns scores (keys, queries) into weights 2^(scale (score - reference)) of the softmax and adds
// them to `total`. Says whether `rescale` holds factors other than 1.
template <class Unit>
bool soften(const Scratch<Unit>& scratch, int keys, int queries, float scale, bool first) {
    bool rescaled = false;
    const float slack = kSlack / scale;
    for (int query = 0; query < queries; query += kWidth) {
        float* scores = scratch.scores + query;
        Floats highest = load(scores);
        for (int key = 1; key < keys; ++key)
            highest = maximum(load(scores + key * kLeftWidth), highest);
        Floats reference = load(scratch.reference + query);
        Floats total = load(scratch.total + query);
        if (first) {
            reference = highest;
            total = Floats{};
        } else {
            const Ints grown = highest > reference + slack;
            bool any = false;
            for (int lane = 0; lane < kWidth; ++lane) any |= grown[lane] != 0;
            Floats factor = splat(1.0f);
            if (any) {
                const Floats raised = grown ? highest : reference;
                factor = grown ? exp2((reference - raised) * scale) : factor;
                reference = raised;
                total *= factor;
                rescaled = true;
            }
            store(scratch.rescale + query, factor);
        }
        for (int key = 0; key < keys; ++key) {
            float* at = scores + key * kLeftWidth;
            // In this order the highest is 0 exactly, however large scores are.
            const Floats weight = exp2((load(at) - reference) * scale);
            total += weight;
            store(at, weight);
        }
        store(scratch.reference + query, reference);
        store(scratch.total + query, total);
    }
    return rescaled;
}

// Rounds weights (keys, queries) to pairs of keys.
inline void pair_up(const float* scores, int keys, int queries, Pair* to) {
    for (int key = 0; key < keys; key += 2)
        for (int query = 0; query < queries; query += kWidth) {
            const float* at = scores + key * kLeftWidth + query;
            const Floats next = key + 1 < keys ? load(at + kLeftWidth) : Floats{};
            const Words pairs = pair_of(load(at), next);
            std::memcpy(to + key / 2 * kLeftWidth + query, &pairs, sizeof(pairs));
        }
}

template <class T>
void write_out(const vsa::ForwardTile& work, const float* sums, int stride, float scale,
               const float* reference, const float* total) {
    const int channels = work.head_dim;
    for (int i = 0; i < work.tile.tokens; ++i) {
        const int64_t token = work.tile.first + i;
        const bool any = work.num_chosen > 0;
        const Floats inverse = splat(any ? 1.0f / total[i] : 0.0f);
        T* out = mutable_row<T>(work.out, token);
        for_vectors(channels, [&](int channel, int count) {
            Floats value = any ? load(sums + i * stride + channel) * inverse : Floats{};
            if (work.coarse != nullptr) {
                const Floats coarse = load_some(work.coarse + channel, count);
                value += work.gate.data == nullptr
                             ? coarse
                             : coarse * load_some(row<T>(work.gate, token) + channel, count);
            }
            store_some(out + channel, value, count);
        });
        work.lse[token] = any ? (reference[i] * scale + log2f(total[i])) * kLn2 : -INFINITY;
    }
    zero_padding<T>(work.out, work.tile, channels);
    for (int token = work.tile.begin; token < work.tile.end; ++token)
        if (token < work.tile.first || token >= work.tile.first + work.tile.tokens)
            work.lse[token] = -INFINITY;
}

}  // namespace

template <class T>
size_t kv_bytes(int head_dim) {
    return PackedKv<UnitOf<T>>({head_dim}, nullptr).bytes;
}

template <class T>
size_t forward_bytes(int head_dim) {
    return Scratch<UnitOf<T>>({head_dim}, nullptr).bytes;
}

template <class T>
void pack_kv(int head_dim, HeadRows k, HeadRows v, Tile tile, std::byte* packed) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{head_dim};
    const PackedKv<Unit> to(shapes, packed);
    pack_transposed(row<T>(k, tile.first), k.token, tile.tokens, head_dim, to.k, shapes.left());
    pack_rows(row<T>(v, tile.first), v.token, tile.tokens, head_dim, to.v, shapes.rows());
}

template <class T>
void forward(const vsa::ForwardTile& work, std::byte* memory) {
    using Unit = UnitOf<T>;
    const Shapes<Unit> shapes{work.head_dim};
    const Scratch<Unit> scratch(shapes, memory);
    const float scale = softmax_scale(work.head_dim) * kLog2e;
    const int queries = work.tile.tokens, width = shapes.row_width();
    const size_t bytes = PackedKv<Unit>(shapes, nullptr).bytes;
    pack_transposed(row<T>(work.q, work.tile.first), work.q.token, queries, work.head_dim,
                    scratch.q, shapes.transposed());
    for (int i = 0; i < work.num_chosen; ++i) {
        const int chosen = work.chosen[i];
        const int keys = work.kv_tiles[chosen].tokens;
        const PackedKv<Unit> kv(shapes, const_cast<std::byte*>(work.packed) + chosen * bytes);
        multiply(kv.k, kLeftWidth, scratch.q, shapes.channel_steps(), shapes.channel_steps(), keys,
                 queries, scratch.scores, kLeftWidth, {kv.v, shapes.rows_size() * sizeof(Unit)});
        if (soften(scratch, keys, queries, scale, i == 0))
            for (int query = 0; query < queries; ++query)
                if (const float factor = scratch.rescale[query]; factor != 1.0f)
                    for (int channel = 0; channel < width; channel += kWidth) {
                        float* at = scratch.sums + query * width + channel;
                        store(at, load(at) * factor);
                    }
        const Unit* weights;
        if constexpr (std::is_same_v<Unit, Pair>) {
            pair_up(scratch.scores, keys, queries, scratch.weights);
            weights = scratch.weights;
        } else {
            weights = scratch.scores;
        }
        const Ahead next = i + 1 < work.num_chosen ? Ahead{work.packed + work.chosen[i + 1] * bytes,
                                                           shapes.left_size() * sizeof(Unit)}
                                                   : Ahead{};
        const auto product = i == 0 ? multiply<Unit> : multiply_add<Unit>;
        product(weights, kLeftWidth, kv.v, Shapes<Unit>::kTokenSteps, steps<Unit>(keys), queries,
                work.head_dim, scratch.sums, width, next);
    }
    write_out<T>(work, scratch.sums, width, scale, scratch.reference, scratch.total);
}

#define FASTVIDEO_FORWARD(T)                                             \
    template size_t kv_bytes<T>(int);                                    \
    template size_t forward_bytes<T>(int);                               \
    template void pack_kv<T>(int, HeadRows, HeadRows, Tile, std::byte*); \
    template void forward<T>(const vsa::ForwardTile&, std::byte*)
FASTVIDEO_FORWARD(float);
FASTVIDEO_FORWARD(BFloat16);
FASTVIDEO_FORWARD(Float16);

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
