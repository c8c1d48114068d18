// SPDX-License-Identifier: Apache-2.0
// Vectors of float32 in GCC's vector extension: one source for SSE, AVX2, AVX-512 and NEON.
//
// The build sets the instruction set by flags and FASTVIDEO_ISA, the namespace all of it lives in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTVIDEO_ISA
#error "FASTVIDEO_ISA names the instruction set, say generic"
#endif

namespace fastvideo::cpu::FASTVIDEO_ISA {

// FASTVIDEO_WIDE tests what AVX-512 does on processors that do not have it.
#if defined(__AVX512F__) || defined(FASTVIDEO_WIDE)
inline constexpr int kWidth = 16;
#else
inline constexpr int kWidth = 8;
#endif

typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef int32_t Ints __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

// Raw bits of the two 16-bit formats, as types so that overloads tell them apart.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class To, class From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline Floats splat(float value) { return value - Floats{}; }

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
    return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_float(Float16 value) { return static_cast<float>(bits_as<_Float16>(value.bits)); }

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
    return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {  // to nearest even; NaN stays NaN
    if (value != value) return {0x7fc0};
    uint32_t bits = bits_as<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float value) {
    return {bits_as<uint16_t>(static_cast<_Float16>(value))};
}

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
inline Floats load(const BFloat16* from) {
    // GCC makes four shuffles of a __builtin_convertvector where one instruction does.
#if defined(__AVX512F__)
    const auto words = bits_as<Words>(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    const auto words = bits_as<Words>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Halves bits;
    std::memcpy(&bits, from, sizeof(bits));
    const auto words = __builtin_convertvector(bits, Words);
#endif
    return bits_as<Floats>(words << 16);
}
inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
    return bits_as<Floats>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return bits_as<Floats>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Floats value;
    for (int i = 0; i < kWidth; ++i) value[i] = to_float(from[i]);
    return value;
#endif
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }
inline void store(BFloat16* to, Floats value) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        bits_as<__m256i>(_mm512_cvtneps_pbh(bits_as<__m512>(value))));
#else
    const Words bits = bits_as<Words>(value);
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = value == value ? rounded : Words{} + 0x7fc0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Both 128-bit halves pack by themselves: their low quarters are the result.
    const __m256i packed =
        _mm256_packus_epi32(bits_as<__m256i>(rounded), bits_as<__m256i>(rounded));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    const Halves halves = __builtin_convertvector(rounded, Halves);
    std::memcpy(to, &halves, sizeof(halves));
#endif
#endif
}
inline void store(Float16* to, Floats value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; ++i) to[i] = from_float<Float16>(value[i]);
#endif
}

// The first `count` of a vector, 0 < count < kWidth; the rest is zero or stays as it is.
template <class T>
inline Floats load_first(const T* from, int count) {
    T whole[kWidth] = {};
    std::memcpy(whole, from, count * sizeof(T));
    return load(whole);
}
template <class T>
inline void store_first(T* to, Floats value, int count) {
    T whole[kWidth];
    store(whole, value);
    std::memcpy(to, whole, count * sizeof(T));
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline float sum_of(Floats value) {
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) value[i] += value[i + half];
    return value[0];
}
inline float maximum_of(Floats value) {
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            value[i] = value[i] > value[i + half] ? value[i] : value[i + half];
    return value[0];
}

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
