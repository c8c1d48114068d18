// SPDX-License-Identifier: Apache-2.0
// Small kernels, right ones and ones with the mistakes that the emulator exists to find.

#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastvideo::cuda {

namespace {

constexpr int kThreads = 128;

// Sums over the warp in three ways, then tells its neighbour in shared memory.
__global__ void neighbours(float* out, bool with_barrier) {
    auto* shared = reinterpret_cast<float*>(dynamic_shared());
    const auto thread = static_cast<int>(threadIdx.x);
    float sum = static_cast<float>(thread);
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
    shared[thread] = sum + static_cast<float>(__popc(__ballot_sync(kAllLanes, thread % 2)));
    if (with_barrier) __syncthreads();
    out[thread] = shared[(thread + 32) % kThreads];
}

// c (16x8) = a (16x16) * b (16x8), all by one warp; b is stored as rows, so it is loaded
// transposed.
template <class T>
__global__ void product(const T* a, const T* b, float* c, bool wait) {
    auto* shared = reinterpret_cast<T*>(dynamic_shared());
    const auto lane = static_cast<int>(threadIdx.x);
    copy_async_16(shared_address(shared + lane * 8), a + lane * 8);
    copy_async_16(shared_address(shared + 256 + lane * 8), b + lane * 8, lane < 16);
    copy_async_commit();
    if (wait) copy_async_wait<0>();
    __syncwarp();
    uint32_t a_fragment[4], b_fragment[4];
    load_matrices(a_fragment, shared_address(shared + lane % 16 * 16 + lane / 16 * 8));
    load_matrices_transposed(b_fragment, shared_address(shared + 256 + lane * 8));
    float sum[4] = {};
    mma<T>(sum, a_fragment, b_fragment[0], b_fragment[1]);
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
    if (!wait) copy_async_wait<0>();
}

__global__ void waits_for_a_thread_that_ended() {
    if (threadIdx.x != 5) __syncthreads();
}

__global__ void shuffles_with_a_mask_that_lacks_the_caller() { __shfl_xor_sync(0xffff0000u, 1, 1); }

__global__ void writes_past_shared_memory() {
    dynamic_shared()[threadIdx.x == 7 ? 512 : threadIdx.x] = 0;
}

__global__ void copies_past_shared_memory(const float* from) {
    copy_async_16(shared_address(dynamic_shared()) + 16 * (threadIdx.x + 1), from);
    copy_async_commit();
    copy_async_wait<0>();
}

__global__ void loads_a_misaligned_vector(const float* from) { (void)load<uint4>(from + 1); }

__global__ void barriers_disagree() { barrier_sync(1, threadIdx.x < 64 ? 64 : 128); }

void run(const std::string& name, const std::vector<float>& in, float* out) {
    if (name == "neighbours" || name == "missing barrier")
        launch(neighbours, 1, kThreads, 512, Stream{}, out, name == "neighbours");
    else if (name == "thread ended")
        launch(waits_for_a_thread_that_ended, 1, kThreads, 0, Stream{});
    else if (name == "mask")
        launch(shuffles_with_a_mask_that_lacks_the_caller, 1, kThreads, 0, Stream{});
    else if (name == "write past shared")
        launch(writes_past_shared_memory, 1, kThreads, 512, Stream{});
    else if (name == "copy past shared")
        launch(copies_past_shared_memory, 1, 32, 512, Stream{}, in.data());
    else if (name == "misaligned")
        launch(loads_a_misaligned_vector, 1, 1, 0, Stream{}, in.data());
    else if (name == "barriers disagree")
        launch(barriers_disagree, 1, kThreads, 0, Stream{});
    else if (name == "too much shared")
        launch(neighbours, 1, kThreads, emulator::kMaxSharedBytes + 1, Stream{}, out, true);
    else
        throw std::invalid_argument("no such probe: " + name);
}

template <class T>
void run_product(const void* a, const void* b, float* c, bool wait) {
    launch(product<T>, 1, 32, 1024, Stream{}, static_cast<const T*>(a), static_cast<const T*>(b), c,
           wait);
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

// Runs a probe that writes up to 128 numbers; returns the error, or null.
__attribute__((visibility("default"))) const char* fastvideo_emulator_probe(const char* name,
                                                                            float* out) {
    using namespace fastvideo::cuda;
    alignas(16) static float zeros[512] = {};
    return error_of([&] { run(name, std::vector<float>(zeros, zeros + 512), out); });
}

// A 16x16 times 16x8 product in either format.
__attribute__((visibility("default"))) const char* fastvideo_emulator_product(const void* a,
                                                                              const void* b,
                                                                              float* c, int is_bf16,
                                                                              int wait) {
    using namespace fastvideo::cuda;
    return error_of([&] {
        if (is_bf16)
            run_product<BFloat16>(a, b, c, wait);
        else
            run_product<Float16>(a, b, c, wait);
    });
}
}
