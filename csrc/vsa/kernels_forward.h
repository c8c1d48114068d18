// SPDX-License-Identifier: Apache-2.0
// Forward pass of fine attention for tensors of T; see FineKernels.
#pragma once

#include "vsa/layout_cpu.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

template <class T>
size_t kv_bytes(int head_dim);
template <class T>
size_t forward_bytes(int head_dim);
template <class T>
void pack_kv(int head_dim, HeadRows k, HeadRows v, Tile tile, std::byte* packed);
template <class T>
void forward(const vsa::ForwardTile& work, std::byte* scratch);

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
