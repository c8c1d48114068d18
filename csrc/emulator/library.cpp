// SPDX-License-Identifier: Apache-2.0
// The namespace fastvideo_emulator, where the CUDA kernels are operators on CPU tensors, and what
// tests ask of the emulator.

#include <torch/csrc/stable/library.h>

#include "emulator/engine.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(fastvideo_emulator, m) {
    for (const char* schema : fastvideo::kSchemas) m.def(schema);
}

extern "C" {

#define FASTVIDEO_EXPORT __attribute__((visibility("default")))

FASTVIDEO_EXPORT void fastvideo_emulator_reset_counters() { fastvideo::emulator::counters() = {}; }
FASTVIDEO_EXPORT uint64_t fastvideo_emulator_launches() {
    return fastvideo::emulator::counters().launches;
}
FASTVIDEO_EXPORT uint64_t fastvideo_emulator_blocks() {
    return fastvideo::emulator::counters().blocks;
}
FASTVIDEO_EXPORT uint64_t fastvideo_emulator_tensor_core_flops() {
    return fastvideo::emulator::counters().tensor_core_flops;
}
FASTVIDEO_EXPORT uint64_t fastvideo_emulator_async_bytes() {
    return fastvideo::emulator::counters().async_bytes;
}
FASTVIDEO_EXPORT uint64_t fastvideo_emulator_largest_shared_bytes() {
    return fastvideo::emulator::counters().largest_shared_bytes;
}
}
