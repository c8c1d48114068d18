// SPDX-License-Identifier: Apache-2.0
// What host code of CUDA kernels needs: errors, the device and stream to use, launching, and the
// namespace its operators are registered in.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#ifdef FASTVIDEO_EMULATOR
#include "emulator/engine.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Only a torch with CUDA has it; weak, so that others can load the library for its CPU kernels.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

// FASTVIDEO_CUDA_IMPL(m) { m.impl("op", TORCH_BOX(&function)); }
#ifdef FASTVIDEO_EMULATOR
#define FASTVIDEO_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastvideo_emulator, CPU, m)
#else
#define FASTVIDEO_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fastvideo, CUDA, m)
#endif

// torch's own check of this kind calls functions that a torch without CUDA lacks.
#define FASTVIDEO_CUDA_CHECK(call)                                   \
    do {                                                             \
        const cudaError_t fastvideo_error = (call);                  \
        STD_TORCH_CHECK(fastvideo_error == cudaSuccess, #call, ": ", \
                        cudaGetErrorString(fastvideo_error));        \
    } while (false)

namespace fastvideo::cuda {

#ifdef FASTVIDEO_EMULATOR

using Stream = void*;

// As in the version for CUDA below, with nothing to do.
class OnDeviceOf {
  public:
    explicit OnDeviceOf(const torch::stable::Tensor&) {}
    Stream stream() const { return nullptr; }
};

// Few, so that small tests fill them and kernels that stay loop.
inline int num_multiprocessors() { return 3; }

// 10 * major + minor.
inline int compute_capability() { return 90; }

// Dynamic shared memory that a block may have.
inline size_t max_shared_bytes() { return emulator::kMaxSharedBytes; }

// Blocks of a kernel that a multiprocessor runs at the same time.
template <class Kernel>
int blocks_per_multiprocessor(Kernel*, int, size_t) {
    return 1;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            Arguments&&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> given(std::forward<Arguments>(arguments)...);
    emulator::launch_blocks(grid, block, shared_bytes, [&] { std::apply(kernel, given); });
}

#else

using Stream = cudaStream_t;

// Makes the tensor's device the current one while it lives.
class OnDeviceOf {
  public:
    explicit OnDeviceOf(const torch::stable::Tensor& tensor)
        : index_(tensor.get_device_index()), guard_(index_) {}

    // torch's current stream of that device.
    Stream stream() const {
        void* stream = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                        "this torch was built without CUDA");
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
        return static_cast<Stream>(stream);
    }

  private:
    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
};

inline int attribute_of_current_device(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    FASTVIDEO_CUDA_CHECK(cudaGetDevice(&device));
    FASTVIDEO_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

inline int num_multiprocessors() {
    return attribute_of_current_device(cudaDevAttrMultiProcessorCount);
}

// 10 * major + minor.
inline int compute_capability() {
    return 10 * attribute_of_current_device(cudaDevAttrComputeCapabilityMajor) +
           attribute_of_current_device(cudaDevAttrComputeCapabilityMinor);
}

// Dynamic shared memory that a block may have.
inline size_t max_shared_bytes() {
    return static_cast<size_t>(
        attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Kernels are to say so if they want more shared memory than all devices have. They always ask for
// the most: a thread that asks for less would take it from a launch of the same kernel in another.
inline void allow_shared(const void* kernel, size_t bytes) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (bytes > kWithoutAsking)
        FASTVIDEO_CUDA_CHECK(cudaFuncSetAttribute(kernel,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(max_shared_bytes())));
}

// Blocks of a kernel that a multiprocessor runs at the same time.
template <class Kernel>
int blocks_per_multiprocessor(Kernel* kernel, int threads, size_t shared_bytes) {
    allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    int blocks = 0;
    FASTVIDEO_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    return blocks;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments&&... arguments) {
    allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    std::tuple<std::decay_t<Parameters>...> given(std::forward<Arguments>(arguments)...);
    std::apply(
        [&](auto&... values) {
            void* pointers[] = {&values..., nullptr};  // never of size 0
            FASTVIDEO_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                                                  block, pointers, shared_bytes, stream));
        },
        given);
}

#endif

}  // namespace fastvideo::cuda
