// SPDX-License-Identifier: Apache-2.0
// Walks the channels of a row in vectors, the last of which may be a part of one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/simd.h"
#include "norm/kernels_cpu.h"

#define FASTVIDEO_INLINE __attribute__((always_inline))

namespace fastvideo::cpu::FASTVIDEO_ISA {

// What a step of the walk covers: a whole vector, or its first `count` lanes.
struct Whole {};
struct Part {
    int count;
};

template <class T>
FASTVIDEO_INLINE inline Floats load(const T* from, Whole) {
    return load(from);
}
template <class T>
FASTVIDEO_INLINE inline Floats load(const T* from, Part part) {
    return load_first(from, part.count);
}
template <class T>
FASTVIDEO_INLINE inline void store(T* to, Floats value, Whole) {
    store(to, value);
}
template <class T>
FASTVIDEO_INLINE inline void store(T* to, Floats value, Part part) {
    store_first(to, value, part.count);
}

// Zero in the lanes past the row's end.
FASTVIDEO_INLINE inline Floats within(Floats value, Whole) { return value; }
FASTVIDEO_INLINE inline Floats within(Floats value, Part part) {
    for (int i = part.count; i < kWidth; ++i) value[i] = 0;
    return value;
}

inline constexpr int kUnroll = 4;

// A sum over a walk: kUnroll chains, so that additions need not wait for each other.
struct Sum {
    Floats chain[kUnroll] = {};
    float total() const { return sum_of((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

// body(first channel, chain, Whole or Part).
template <class Body>
FASTVIDEO_INLINE inline void for_channels(int64_t dim, const Body& body) {
    int64_t d = 0;
    for (; d + kUnroll * kWidth <= dim; d += kUnroll * kWidth) {
        body(d, 0, Whole{});
        body(d + kWidth, 1, Whole{});
        body(d + 2 * kWidth, 2, Whole{});
        body(d + 3 * kWidth, 3, Whole{});
    }
    for (; d + kWidth <= dim; d += kWidth) body(d, 0, Whole{});
    if (d < dim) body(d, 0, Part{static_cast<int>(dim - d)});
}

// The memory system fetches a row while another is being computed.
template <class T>
FASTVIDEO_INLINE inline void prefetch(const T* row, int64_t channel) {
    if (row != nullptr) __builtin_prefetch(row + channel);
}

// float32 vectors of `dim` channels each, padded to whole vector registers.
class Scratch {
  public:
    Scratch(int64_t vectors, int64_t dim) : stride_((dim + 15) / 16 * 16) {
        // A cache line is also the widest register. Channels past `dim` are read, never used.
        const int64_t bytes = vectors * stride_ * static_cast<int64_t>(sizeof(float));
        data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (!data_) throw std::bad_alloc();
        std::memset(data_.get(), 0, bytes);
    }
    float* operator[](int64_t vector) { return data_.get() + vector * stride_; }

  private:
    struct Free {
        void operator()(float* data) const { std::free(data); }
    };
    int64_t stride_;
    std::unique_ptr<float, Free> data_;
};

template <class T>
T* row_of(const Rows& rows, int64_t batch, int64_t token, int64_t head = 0) {
    if (rows.data == nullptr) return nullptr;
    return static_cast<T*>(rows.data) + batch * rows.batch + token * rows.token + head * rows.head;
}

// One of Vectors: float32 or T.
template <class T>
struct Vector {
    float* as_float = nullptr;
    T* as_narrow = nullptr;

    Vector(const Vectors& vectors, int64_t batch = 0, int64_t group = 0) {
        const int64_t offset = batch * vectors.batch + group * vectors.group;
        if (vectors.data == nullptr) return;
        if (vectors.is_float)
            as_float = static_cast<float*>(vectors.data) + offset;
        else
            as_narrow = static_cast<T*>(vectors.data) + offset;
    }

    explicit operator bool() const { return as_float != nullptr || as_narrow != nullptr; }

    template <class Extent>
    FASTVIDEO_INLINE Floats at(int64_t channel, Extent extent, float missing) const {
        if (as_float != nullptr) return load(as_float + channel, extent);
        if (as_narrow != nullptr) return load(as_narrow + channel, extent);
        return splat(missing);
    }

    template <class Extent>
    FASTVIDEO_INLINE void set(int64_t channel, Floats value, Extent extent) const {
        if (as_float != nullptr)
            store(as_float + channel, value, extent);
        else if (as_narrow != nullptr)
            store(as_narrow + channel, value, extent);
    }
};

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
