// SPDX-License-Identifier: Apache-2.0
// Backward pass of fine attention for tensors of T; see FineKernels.
#pragma once

#include "vsa/layout_cpu.h"

namespace fastvideo::cpu::FASTVIDEO_ISA {

template <class T>
size_t query_bytes(int head_dim);
template <class T>
size_t backward_bytes(int head_dim);
template <class T>
void begin_query(const vsa::QueryTile& query);
template <class T>
void begin_key(const vsa::KeyTile& key);
template <class T>
void pair(const vsa::KeyTile& key, const vsa::QueryTile& query);
template <class T>
void add_dq(const vsa::KeyTile& key, const vsa::QueryTile& query);
template <class T>
void end_key(const vsa::KeyTile& key);
template <class T>
void end_query(const vsa::QueryTile& query);

}  // namespace fastvideo::cpu::FASTVIDEO_ISA
