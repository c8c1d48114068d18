// SPDX-License-Identifier: Apache-2.0
// Which instruction set this processor's kernels use; the same sources are compiled for each.
#pragma once

#include <string>

namespace fastvideo::cpu {

enum class Isa { generic, avx2, avx512, avx512_bf16 };

const char* name_of(Isa isa);

// The best that processor and operating system offer, or what FASTVIDEO_CPU_ISA names, which must
// be among them. Throws std::runtime_error for a name that is unknown or not to be had here.
Isa isa();

}  // namespace fastvideo::cpu

// Picks one of the tables of functions that each build of a kernel source exports:
//   const auto& kernels = FASTVIDEO_KERNELS(vsa_kernels);   ->  fastvideo::cpu::avx2::vsa_kernels()
// With FASTVIDEO_ONE_ISA there is one build, called generic, whatever its flags: for tests.
#if defined(__x86_64__) && !defined(FASTVIDEO_ONE_ISA)
#define FASTVIDEO_KERNELS(table)                                   \
    (::fastvideo::cpu::isa() == ::fastvideo::cpu::Isa::avx512_bf16 \
         ? ::fastvideo::cpu::avx512_bf16::table()                  \
     : ::fastvideo::cpu::isa() == ::fastvideo::cpu::Isa::avx512    \
         ? ::fastvideo::cpu::avx512::table()                       \
     : ::fastvideo::cpu::isa() == ::fastvideo::cpu::Isa::avx2      \
         ? ::fastvideo::cpu::avx2::table()                         \
         : ::fastvideo::cpu::generic::table())
#define FASTVIDEO_DECLARE_KERNELS(type, table) \
    namespace fastvideo::cpu::generic {        \
    const type& table();                       \
    }                                          \
    namespace fastvideo::cpu::avx2 {           \
    const type& table();                       \
    }                                          \
    namespace fastvideo::cpu::avx512 {         \
    const type& table();                       \
    }                                          \
    namespace fastvideo::cpu::avx512_bf16 {    \
    const type& table();                       \
    }
#else
#define FASTVIDEO_KERNELS(table) ::fastvideo::cpu::generic::table()
#define FASTVIDEO_DECLARE_KERNELS(type, table) \
    namespace fastvideo::cpu::generic {        \
    const type& table();                       \
    }
#endif
