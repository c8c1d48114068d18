// SPDX-License-Identifier: Apache-2.0
// Shared memory as bulk copies and products of warpgroups see it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastvideo::emulator {

// Reads what copies have brought and what was stored before a fence_proxy_async().
void read_as_async_proxy(uint32_t address, void* to, size_t bytes);

// Of 128 bytes: where the hardware puts what would be at `address`.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace fastvideo::emulator
