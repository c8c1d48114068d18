// SPDX-License-Identifier: Apache-2.0
// Small kernels of Hopper's instructions, right ones and ones with the mistakes that the emulator
// exists to find.

#include <cstring>
#include <exception>
#include <string>

#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/wgmma.h"

namespace fastvideo::cuda {

namespace {

// What may be left out of a product.
struct Mistakes {
    bool no_wait_for_copies, no_wait_for_product, no_fence_of_registers, no_fence_of_proxy,
        too_many_bytes, overwrites_a, no_commit;
};

constexpr uint32_t kBox = 64 * kBoxRowBytes;

// d (64xN) = a (64x64) * b, where b is (N,64), rows by channels, or (64,N), channels by rows. A
// comes from shared memory, or through registers.
template <class T, int N, B layout, bool a_in_registers>
__global__ void product(const __grid_constant__ CUtensorMap a_map,
                        const __grid_constant__ CUtensorMap b_map, float* out, Mistakes mistakes) {
    unsigned char* shared = dynamic_shared();
    auto& barrier = *reinterpret_cast<Mbarrier*>(shared + 3 * kBox);
    const uint32_t a_tile = shared_address(shared), b_tile = a_tile + kBox;
    constexpr int kBoxes = layout == B::kChannelsByRows ? (N + 63) / 64 : 1;
    const int thread = threadIdx.x;
    if (thread == 0) init(barrier, 1);
    fence_mbarrier_init();
    __syncthreads();
    if (thread == 0) {
        arrive_expecting(barrier, (1 + kBoxes) * kBox + (mistakes.too_many_bytes ? 16 : 0));
        copy_box(a_tile, a_map, 0, 0, 0, 0, barrier);
        for (int i = 0; i < kBoxes; ++i)
            copy_box(b_tile + i * kBox, b_map, 64 * i, 0, 0, 0, barrier);
    }
    if (!mistakes.no_wait_for_copies) wait(barrier, 0);
    // Zeroes the last rows of A.
    if (mistakes.no_fence_of_proxy) {
        if (thread < 64) store(shared + 56 * kBoxRowBytes + thread * 16, uint4{0, 0, 0, 0});
        __syncthreads();
    }
    uint32_t a[4][4];
    if constexpr (a_in_registers) {
        const int row = thread / 32 * 16 + thread % 32 / 4;
        for (int i = 0; i < 16; ++i) {
            const uint32_t place = (row + i % 2 * 8) * 128 + i / 2 * 16 + thread % 4 * 4;
            a[i / 4][i % 4] = load<uint32_t>(shared + (place ^ (place >> 7 & 7) << 4));
        }
    }
    float d[N / 2];
    if (!mistakes.no_fence_of_registers) wgmma_fence();
    for (int step = 0; step < 4; ++step) {
        const uint64_t b = layout == B::kRowsByChannels ? rows_by_channels(b_tile, step, kBox)
                                                        : channels_by_rows(b_tile, step, kBox);
        const auto multiply = [&](auto a_operand) {
            if (step == 0)
                wgmma<T, N, layout, false>(d, a_operand(), b);
            else
                wgmma<T, N, layout>(d, a_operand(), b);
        };
        if constexpr (a_in_registers)
            multiply([&]() -> const uint32_t (&)[4] { return a[step]; });
        else
            multiply([&] { return rows_by_channels(a_tile, step, kBox); });
    }
    if (!mistakes.no_commit) wgmma_commit();
    if (mistakes.overwrites_a) a[3][0] = 0;
    if (!mistakes.no_wait_for_product) wgmma_wait<0>();
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = 0; i < N / 2; ++i)
        out[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
    if (mistakes.no_wait_for_product) wgmma_wait<0>();
    if (mistakes.no_wait_for_copies) wait(barrier, 0);
}

// Brings the box at (channel, token) of a (tokens,channels) tensor to `out` as it lies in memory.
__global__ void copy(const __grid_constant__ CUtensorMap map, int channel, int token, int rows,
                     uint32_t* out) {
    unsigned char* shared = dynamic_shared();
    auto& barrier = *reinterpret_cast<Mbarrier*>(shared + kBox);
    if (threadIdx.x == 0) {
        init(barrier, 1);
        fence_mbarrier_init();
        arrive_expecting(barrier, rows * kBoxRowBytes);
        copy_box(shared_address(shared), map, channel, token, 0, 0, barrier);
    }
    __syncthreads();
    wait(barrier, 0);
    for (int i = threadIdx.x; i < rows * 32; i += blockDim.x)
        out[i] = load<uint32_t>(shared + 4 * i);
}

// Two threads add up what the other has announced, and arrive too often if asked to.
__global__ void arrivals(float* out, int too_many) {
    auto& barrier = *reinterpret_cast<Mbarrier*>(dynamic_shared());
    auto* values = reinterpret_cast<float*>(dynamic_shared() + 64);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) init(barrier, 2);
    __syncthreads();
    for (int round = 0; round < 5; ++round) {
        if (threadIdx.x % 32 == 0) values[warp] = static_cast<float>(10 * round + warp);
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            for (int i = 0; i <= (round == 3 ? too_many : 0); ++i) arrive(barrier);
        wait(barrier, round % 2);
        out[5 * warp + round] = values[1 - warp];
        barrier_sync(1, 64);
    }
}

CUtensorMap map_of(const void* data, int64_t rows, int64_t channels, bool is_bf16, int box_rows) {
    return map_boxes({"probe", data, is_bf16, channels, rows, 1, 1, channels, 0, 0}, box_rows);
}

template <class T, int N, B layout>
void run_product(const void* a, const void* b, float* out, bool a_in_registers,
                 const Mistakes& mistakes) {
    const bool is_bf16 = __is_same(T, BFloat16);
    const bool transposed = layout == B::kChannelsByRows;
    const CUtensorMap a_map = map_of(a, 64, 64, is_bf16, 64);
    const CUtensorMap b_map = map_of(b, transposed ? 64 : N, transposed ? N : 64, is_bf16, 64);
    launch(a_in_registers ? product<T, N, layout, true> : product<T, N, layout, false>, 1, 128,
           3 * kBox + 64, Stream{}, a_map, b_map, out, mistakes);
}

template <class T, B layout>
void run_product(int columns, const void* a, const void* b, float* out, bool a_in_registers,
                 const Mistakes& mistakes) {
    const auto run = [&](auto function) { function(a, b, out, a_in_registers, mistakes); };
    if (columns == 16) return run(run_product<T, 16, layout>);
    if (columns == 32) return run(run_product<T, 32, layout>);
    if (columns == 48) return run(run_product<T, 48, layout>);
    if (columns == 64) return run(run_product<T, 64, layout>);
    if constexpr (layout == B::kChannelsByRows) {
        if (columns == 128) return run(run_product<T, 128, layout>);
    }
    throw std::invalid_argument("no probe of so many columns");
}

template <class Function>
const char* error_of(Function function) {
    static std::string message;
    try {
        function();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace

}  // namespace fastvideo::cuda

extern "C" {

#define FASTVIDEO_EXPORT __attribute__((visibility("default")))

// The product above, in either format and layout; `mistake` names one to make, or is empty.
FASTVIDEO_EXPORT const char* fastvideo_emulator_wgmma(const void* a, const void* b, float* out,
                                                      int columns, int is_bf16, int b_is_transposed,
                                                      int a_in_registers, const char* mistake) {
    using namespace fastvideo::cuda;
    return error_of([&] {
        const auto makes = [&](const char* name) { return std::strcmp(mistake, name) == 0; };
        const Mistakes mistakes{
            makes("no wait for copies"),
            makes("no wait for product"),
            makes("no fence of registers"),
            makes("no fence of proxy"),
            makes("too many bytes"),
            makes("overwrites a"),
            makes("no commit"),
        };
        const auto run = [&](auto function) {
            function(columns, a, b, out, a_in_registers != 0, mistakes);
        };
        if (is_bf16 && b_is_transposed)
            run(run_product<BFloat16, B::kChannelsByRows>);
        else if (is_bf16)
            run(run_product<BFloat16, B::kRowsByChannels>);
        else if (b_is_transposed)
            run(run_product<Float16, B::kChannelsByRows>);
        else
            run(run_product<Float16, B::kRowsByChannels>);
    });
}

FASTVIDEO_EXPORT const char* fastvideo_emulator_copy_box(const void* from, int64_t rows,
                                                         int64_t channels, int channel, int token,
                                                         int box_rows, uint32_t* out) {
    using namespace fastvideo::cuda;
    return error_of([&] {
        launch(copy, 1, 64, kBox + 64, Stream{}, map_of(from, rows, channels, true, box_rows),
               channel, token, box_rows, out);
    });
}

FASTVIDEO_EXPORT const char* fastvideo_emulator_arrivals(float* out, int too_many) {
    using namespace fastvideo::cuda;
    return error_of([&] { launch(arrivals, 1, 64, 128, Stream{}, out, too_many); });
}
}
