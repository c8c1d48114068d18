// SPDX-License-Identifier: Apache-2.0
// Defines the operators of the namespace `fastvideo` and says what this build holds.

#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "cpu/isa.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(fastvideo, m) {
    for (const char* schema : fastvideo::kSchemas) m.def(schema);
}

// Read by fastvideo/ops/library.py through ctypes: questions without tensors need no operator.
extern "C" {

// How it was built, as JSON.
__attribute__((visibility("default"))) const char* fastvideo_build() {
    return FASTVIDEO_BUILD_INFO;
}

// The instruction set CPU kernels use; "error: ..." where FASTVIDEO_CPU_ISA asks for too much.
__attribute__((visibility("default"))) const char* fastvideo_cpu_isa() {
    static const std::string answer = [] {
        try {
            return std::string(fastvideo::cpu::name_of(fastvideo::cpu::isa()));
        } catch (const std::exception& error) {
            return std::string("error: ") + error.what();
        }
    }();
    return answer.c_str();
}
}
