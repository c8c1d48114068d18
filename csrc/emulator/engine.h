// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a CUDA grid one after another, each thread of a block as a fiber, as unkindly
// as the programming model allows.
//
// What the hardware may do in any order is done in an order that FASTVIDEO_EMULATOR_SEED chooses:
// which warp runs and for how long, whether asynchronous work ends at once or when it is waited
// for. Shared memory starts as NaN. A block in which no thread can go on is an error, and so are
// accesses outside of shared memory and arguments that the instruction does not allow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <typeindex>
#include <unordered_map>

// CUDA's names for a thread's place: set whenever a fiber goes on.
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace fastvideo::emulator {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kWarpgroup = 128;
// Of an H100: what a block may ask for.
inline constexpr size_t kMaxSharedBytes = 232448;

// What was executed since reset_counters().
struct Counters {
    uint64_t launches = 0, blocks = 0;
    uint64_t tensor_core_flops = 0;
    uint64_t async_bytes = 0;           // read from global memory by asynchronous copies
    uint64_t largest_shared_bytes = 0;  // of a launch
};
Counters& counters();

// ---- launching ---------------------------------------------------------------------------------

void launch_blocks(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- for the running thread --------------------------------------------------------------------

// Its number in the block.
unsigned thread();

// Ends the launch with an error that says which thread of which block it was.
[[noreturn]] void fail(const std::string& message);

// An arbitrary number below `bound`, from the seed.
unsigned random(unsigned bound);
// Whether asynchronous work issued now ends at once; otherwise it ends as late as allowed. A seed
// of 0 lets all of it end late.
bool ends_early();

// Blocks the thread until `ready` holds; `reason` is for the report of a deadlock.
using Condition = std::function<bool()>;
void wait_until(const Condition& ready, const char* reason);

// Has the hardware do something on its own account: in any order with other such effects, at the
// latest when no thread can go on without it.
void defer(std::function<void()> effect);

// State of the block for which T is the key, default-made when the block starts.
void* block_state(std::type_index key, std::shared_ptr<void> (*make)());
template <class T>
T& block_state() {
    return *static_cast<T*>(
        block_state(typeid(T), []() -> std::shared_ptr<void> { return std::make_shared<T>(); }));
}

// ---- shared memory -----------------------------------------------------------------------------

// Dynamic shared memory of the block, aligned to 1024 bytes.
unsigned char* dynamic_shared();
size_t shared_bytes();
// Addresses of the shared window, as 32-bit numbers; 0 is not one of them.
uint32_t shared_address(const void* pointer);
// The memory at an address, checked.
unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what);

inline void check_aligned(const void* pointer, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment)
        fail(std::string(what) + ": address is not a multiple of " + std::to_string(alignment));
}

// ---- collectives -------------------------------------------------------------------------------

// The threads of a warp in `mask` meet; the last one calls `act` with the arguments of each lane
// (null where not in the mask). All of them must name the same collective.
using Act = void (*)(void* const* lanes);
void meet(unsigned first_thread, unsigned num_threads, uint32_t mask, const char* name,
          void* arguments, Act act);

// `act(Args* const* lanes)` sees 32 pointers; `mask` must hold the caller.
template <class Args, class Function>
void warp_collective(const char* name, uint32_t mask, Args& arguments, Function) {
    meet(thread() / kWarp * kWarp, kWarp, mask, name, &arguments,
         [](void* const* lanes) { Function{}(reinterpret_cast<Args* const*>(lanes)); });
}
template <class Args, class Function>
void warpgroup_collective(const char* name, Args& arguments, Function) {
    meet(thread() / kWarpgroup * kWarpgroup, kWarpgroup, ~0u, name, &arguments,
         [](void* const* threads) { Function{}(reinterpret_cast<Args* const*>(threads)); });
}
template <class Args, class Function>
void block_collective(const char* name, Args& arguments, Function) {
    meet(0, blockDim.x * blockDim.y * blockDim.z, ~0u, name, &arguments,
         [](void* const* threads) { Function{}(reinterpret_cast<Args* const*>(threads)); });
}

// bar.sync / bar.arrive of one of the 16 barriers; `num_threads` a multiple of the warp.
void barrier(unsigned id, unsigned num_threads, bool wait);

// ---- copies of 16 bytes: cp.async --------------------------------------------------------------

void copy_async(uint32_t to, const void* from, size_t bytes, bool valid);
void copy_async_commit();
// Until at most `pending` of the thread's latest groups are under way.
void copy_async_wait(size_t pending);
// Has the hardware call `effect` when all of the thread's copies so far have landed.
void copy_async_then(std::function<void()> effect);

}  // namespace fastvideo::emulator
