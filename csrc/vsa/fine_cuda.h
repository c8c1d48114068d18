// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the fine attention. Rows are aligned to 16 bytes; a stride from token to
// token fits kMostTokenStride.
#pragma once

#include "cuda/launch.h"
#include "vsa/fine.h"

namespace fastvideo::vsa {

// In elements: kernels multiply it by a few rows in 32 bits.
inline constexpr int64_t kMostTokenStride = int64_t{1} << 26;

// delta, dgate and dcoarse: the first part of every backward.
void backward_delta(const FineBackward& problem, cuda::Stream stream);

// By mma.sync, from compute capability 8.0 on.
void forward_mma(const FineForward& problem, cuda::Stream stream);
void backward_mma(const FineBackward& problem, cuda::Stream stream);

#ifdef FASTVIDEO_SM90
// By wgmma, on 9.0 alone.
void forward_sm90(const FineForward& problem, cuda::Stream stream);
void backward_sm90(const FineBackward& problem, cuda::Stream stream);
#endif

}  // namespace fastvideo::vsa
