// SPDX-License-Identifier: Apache-2.0
// Tensor maps, made on the host, which tell bulk copies where the boxes of a tensor are.
#pragma once

#include <cstdint>

#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/wgmma.h"

#ifndef FASTVIDEO_EMULATOR
#include <cuda.h>
#endif

namespace fastvideo::cuda {

// A (B,H,S,D) tensor of 16-bit numbers with dense rows; strides in elements.
struct MappedTensor {
    const char* name;
    const void* data;
    bool is_bf16;
    int64_t channels, tokens, heads, batch;
    int64_t token_stride, head_stride, batch_stride;
};

#ifdef FASTVIDEO_EMULATOR

inline void encode(CUtensorMap& map, const MappedTensor& tensor, const uint64_t (&sizes)[4],
                   const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
    emulator::encode_tensor_map(map, tensor.data, sizes, strides, box);
}

#else

inline void encode(CUtensorMap& map, const MappedTensor& tensor, const uint64_t (&sizes)[4],
                   const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
    // Asked of the driver: a library linked to libcuda would not load where there is no GPU.
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode_tiled = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        FASTVIDEO_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              12000, cudaEnableDefault, &result));
        STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && found != nullptr,
                        "the driver is older than CUDA 12.0: it has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(found);
    }();
    const uint32_t element_strides[4] = {1, 1, 1, 1};
    const CUresult result = encode_tiled(
        &map, tensor.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        4, const_cast<void*>(tensor.data), sizes, strides, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(result == CUDA_SUCCESS, tensor.name,
                    ": cuTensorMapEncodeTiled refused it with error ", static_cast<int>(result));
}

#endif

// For boxes of 64 channels, swizzled by 128 bytes, and `rows` tokens.
inline CUtensorMap map_boxes(const MappedTensor& tensor, uint32_t rows) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0, tensor.name,
                    " begins at an address that is not a multiple of 16 bytes");
    const uint64_t sizes[4] = {
        static_cast<uint64_t>(tensor.channels), static_cast<uint64_t>(tensor.tokens),
        static_cast<uint64_t>(tensor.heads), static_cast<uint64_t>(tensor.batch)};
    const int64_t given[3] = {tensor.token_stride, tensor.head_stride, tensor.batch_stride};
    uint64_t strides[3];
    for (int i = 0; i < 3; ++i) {
        // No one steps along an axis of size 1, and its stride may be any number.
        const int64_t stride = sizes[i + 1] > 1 ? given[i] : tensor.channels;
        STD_TORCH_CHECK(stride > 0 && stride % 8 == 0, tensor.name, " has stride ", stride,
                        " between ", (const char*[]){"tokens", "heads", "batches"}[i],
                        ", expected a positive multiple of 8");
        strides[i] = static_cast<uint64_t>(stride) * 2;
    }
    const uint32_t box[4] = {kBoxColumns, rows, 1, 1};
    CUtensorMap map;
    encode(map, tensor, sizes, strides, box);
    return map;
}

}  // namespace fastvideo::cuda
