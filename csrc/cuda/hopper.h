// SPDX-License-Identifier: Apache-2.0
// PTX of sm_90a that CUDA C++ has no words for: mbarriers, bulk tensor copies, register budgets.
// Matrix products of warpgroups are in wgmma.h; csrc/emulator/hopper.h is what g++ makes of both.
//
// Two proxies reach shared memory: the generic one (ordinary accesses, mbarriers) and the async one
// (bulk copies, operands of wgmma). A bulk copy's bytes are visible to every thread that saw the
// mbarrier complete which the copy counts on. The other way, bytes written by ordinary stores are
// visible to the async proxy after fence_proxy_async() in the writing thread and a barrier.
#pragma once

#include <cstdint>

#include "cuda/device.h"

#ifdef FASTVIDEO_EMULATOR
#include "emulator/hopper.h"
#else
#include <cuda.h>
#endif

namespace fastvideo::cuda {

// ---- mbarriers ---------------------------------------------------------------------------------

// A phase ends when `count` arrivals were made and all bytes that were announced have landed; the
// next begins at once. Phases are told apart by parity: the first has parity 0.
struct alignas(8) Mbarrier {
    uint64_t state;
};

__device__ __forceinline__ void init(Mbarrier& barrier, uint32_t count) {
#ifdef FASTVIDEO_EMULATOR
    emulator::mbarrier_init(barrier.state, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(count)
                 : "memory");
#endif
}

// Between a thread's init() and a __syncthreads after which others and bulk copies use them.
__device__ __forceinline__ void fence_mbarrier_init() {
#ifdef FASTVIDEO_EMULATOR
    emulator::fence_mbarrier_init();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Has release semantics, as wait() acquires: what was written before is seen after.
__device__ __forceinline__ void arrive(Mbarrier& barrier) {
#ifdef FASTVIDEO_EMULATOR
    emulator::mbarrier_arrive(barrier.state, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
                 : "memory");
#endif
}

// Announces bytes of bulk copies, then arrives.
__device__ __forceinline__ void arrive_expecting(Mbarrier& barrier, uint32_t bytes) {
#ifdef FASTVIDEO_EMULATOR
    emulator::mbarrier_arrive(barrier.state, bytes);
#else
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
        "r"(bytes)
        : "memory");
#endif
}

// Until the phase with that parity has ended. Only the current phase and the one before can be told
// apart, so a thread may skip no phase. On a fresh barrier parity 1 has ended.
__device__ __forceinline__ void wait(Mbarrier& barrier, uint32_t parity) {
#ifdef FASTVIDEO_EMULATOR
    emulator::mbarrier_wait(barrier.state, parity);
#else
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"  // try_wait suspends the thread for a while, then may fail
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
#endif
}

// ---- copies ------------------------------------------------------------------------------------

// Makes ordinary stores to shared memory visible to bulk copies and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef FASTVIDEO_EMULATOR
    emulator::fence_proxy_async();
#else
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Copies a box of a (B,H,S,D) tensor to shared memory, aligned to 1024 bytes and swizzled as the
// map says; rows outside of the tensor arrive as zeros and count as bytes all the same.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int channel,
                                         int token, int head, int batch, Mbarrier& barrier) {
#ifdef FASTVIDEO_EMULATOR
    emulator::copy_box(to, map, {channel, token, head, batch}, barrier.state);
#else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(token), "r"(head), "r"(batch)
        : "memory");
#endif
}

// Arrives when the calling thread's ordinary copies (copy_async_4 and _16) so far have landed; one
// of the barrier's `count`.
__device__ __forceinline__ void arrive_after_copies(Mbarrier& barrier) {
#ifdef FASTVIDEO_EMULATOR
    emulator::arrive_after_copies(barrier.state);
#else
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
        : "memory");
#endif
}

// ---- registers ---------------------------------------------------------------------------------

// The warpgroup's registers for each thread from here on; all of its warps must come here.
template <int registers>
__device__ __forceinline__ void keep_registers() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
#ifndef FASTVIDEO_EMULATOR
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
__device__ __forceinline__ void take_registers() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
#ifndef FASTVIDEO_EMULATOR
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

}  // namespace fastvideo::cuda
