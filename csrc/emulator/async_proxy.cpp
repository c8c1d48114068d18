// SPDX-License-Identifier: Apache-2.0
// Mbarriers, tensor maps and the copies that arrive at mbarriers.
#include "emulator/async_proxy.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/engine.h"
#include "emulator/hopper.h"

namespace fastvideo::emulator {

namespace {

// What the 64 bits of an mbarrier hold here; the hardware does not say what they hold there.
struct Mbarrier {
    uint64_t pending : 20, count : 20, phase : 1;
    int64_t bytes : 23;  // announced and not landed
};

constexpr uint64_t kMaxCount = (1u << 20) - 1;

Mbarrier read(const uint64_t& state) {
    const auto barrier = std::bit_cast<Mbarrier>(state);
    if (barrier.count == 0 || barrier.count == kMaxCount)  // shared memory starts as ones
        fail("an mbarrier is used that was not initialised");
    return barrier;
}

void write(uint64_t& state, Mbarrier barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase ^= 1;
        barrier.pending = barrier.count;
    }
    state = std::bit_cast<uint64_t>(barrier);
}

void land(uint64_t& state, size_t bytes) {
    Mbarrier barrier = read(state);
    barrier.bytes -= static_cast<int64_t>(bytes);
    write(state, barrier);
}

struct AsyncView {
    std::vector<unsigned char> bytes = std::vector<unsigned char>(shared_bytes(), 0xff);

    unsigned char* at(uint32_t address) {
        return bytes.data() + (address - shared_address(dynamic_shared()));
    }
};

void write_as_async_proxy(uint32_t address, const void* from, size_t bytes) {
    std::memcpy(shared_pointer(address, bytes, 1, "bulk copy"), from, bytes);
    std::memcpy(block_state<AsyncView>().at(address), from, bytes);
}

// 8 neighbouring channels, zeros where the tensor has none.
void read_vector(const CUtensorMap& map, std::array<int64_t, 4> place, uint16_t (&vector)[8]) {
    std::fill(std::begin(vector), std::end(vector), 0);
    for (int i = 1; i < 4; ++i)
        if (place[i] < 0 || place[i] >= static_cast<int64_t>(map.sizes[i])) return;
    for (int i = 0; i < 8; ++i) {
        const int64_t channel = place[0] + i;
        if (channel < 0 || channel >= static_cast<int64_t>(map.sizes[0])) continue;
        const unsigned char* from = map.base + channel * 2;
        for (int axis = 1; axis < 4; ++axis) from += place[axis] * map.strides[axis];
        std::memcpy(&vector[i], from, 2);
        counters().async_bytes += 2;
    }
}

}  // namespace

// ---- mbarriers ---------------------------------------------------------------------------------

void mbarrier_init(uint64_t& state, uint32_t count) {
    shared_pointer(shared_address(&state), 8, 8, "mbarrier.init");
    if (count == 0 || count >= kMaxCount) fail("mbarrier.init: count " + std::to_string(count));
    state = std::bit_cast<uint64_t>(Mbarrier{count, count, 0, 0});
}

void mbarrier_arrive(uint64_t& state, uint32_t expected_bytes) {
    Mbarrier barrier = read(state);
    if (barrier.pending == 0) fail("mbarrier.arrive: more arrivals than the count in one phase");
    --barrier.pending;
    barrier.bytes += expected_bytes;
    write(state, barrier);
}

void mbarrier_wait(uint64_t& state, uint32_t parity) {
    wait_until([&] { return read(state).phase != parity; }, "mbarrier.try_wait");
}

// ---- the view of the async proxy ---------------------------------------------------------------

void fence_proxy_async() {
    AsyncView& view = block_state<AsyncView>();
    std::memcpy(view.bytes.data(), dynamic_shared(), view.bytes.size());
}

void read_as_async_proxy(uint32_t address, void* to, size_t bytes) {
    shared_pointer(address, bytes, 1, "wgmma");
    std::memcpy(to, block_state<AsyncView>().at(address), bytes);
}

// ---- copies ------------------------------------------------------------------------------------

void encode_tensor_map(CUtensorMap& map, const void* base, const uint64_t (&sizes)[4],
                       const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
    const auto check = [](bool holds, const char* what) {
        if (!holds) throw std::runtime_error(std::string("cuTensorMapEncodeTiled: ") + what);
    };
    check(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the address is not a multiple of 16");
    check(box[0] * 2 <= 128, "a swizzled row of a box has at most 128 bytes");
    map.base = static_cast<const unsigned char*>(base);
    for (int i = 0; i < 4; ++i) {
        check(sizes[i] > 0 && sizes[i] <= 1ull << 32, "a size is not in 1 to 2^32");
        check(box[i] > 0 && box[i] <= 256, "a box has 1 to 256 elements along an axis");
        map.sizes[i] = sizes[i];
        map.box[i] = box[i];
        map.strides[i] = i == 0 ? 2 : strides[i - 1];
        if (i > 0)
            check(map.strides[i] % 16 == 0 && map.strides[i] < 1ull << 40,
                  "a stride is not a multiple of 16 below 2^40");
    }
}

void copy_box(uint32_t to, const CUtensorMap& map, std::array<int, 4> first, uint64_t& barrier) {
    const size_t bytes = size_t{map.box[0]} * map.box[1] * map.box[2] * map.box[3] * 2;
    // The instruction asks for 128; the pattern of 128 bytes' swizzle starts at multiples of 1024.
    shared_pointer(to, bytes, 1024, "cp.async.bulk.tensor");
    if (map.box[0] != 64 || map.box[2] != 1 || map.box[3] != 1)
        fail("cp.async.bulk.tensor: only boxes of rows of 64 channels are emulated");
    read(barrier);
    defer([=, &barrier] {
        for (unsigned row = 0; row < map.box[1]; ++row)
            for (unsigned i = 0; i < 64; i += 8) {
                uint16_t vector[8];
                read_vector(map, {first[0] + i, int64_t{first[1]} + row, first[2], first[3]},
                            vector);
                write_as_async_proxy(swizzled(to + row * 128 + i * 2), vector, sizeof vector);
            }
        land(barrier, bytes);
    });
}

void arrive_after_copies(uint64_t& barrier) {
    copy_async_then([&barrier] { mbarrier_arrive(barrier, 0); });
}

}  // namespace fastvideo::emulator
