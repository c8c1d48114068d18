// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace fastvideo::cpu {

namespace {

Isa best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
    if (avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::generic;
}

Isa choose() {
    const Isa most = best();
    const char* asked = std::getenv("FASTVIDEO_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return most;
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
        if (std::string(name_of(isa)) != asked) continue;
        if (isa <= most) return isa;
        throw std::runtime_error(std::string("FASTVIDEO_CPU_ISA=") + asked +
                                 ": this processor has no more than " + name_of(most));
    }
    throw std::runtime_error(std::string("FASTVIDEO_CPU_ISA=") + asked +
                             ": use generic, avx2, avx512 or avx512_bf16");
}

}  // namespace

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::generic:
            return "generic";
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::avx512_bf16:
            return "avx512_bf16";
    }
    return "unknown";
}

Isa isa() {
    static const Isa chosen = choose();
    return chosen;
}

}  // namespace fastvideo::cpu
