// SPDX-License-Identifier: Apache-2.0
// Products of warpgroups: operands are read, and results appear, when the hardware may do so last,
// or at any earlier time the seed chooses.
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/async_proxy.h"
#include "emulator/engine.h"
#include "emulator/hopper.h"
#include "emulator/tensor_core.h"

namespace fastvideo::emulator {

namespace {

constexpr unsigned kRows = 64, kDepth = 16, kMaxColumns = 256;

// The registers of 128 threads that hold a 64xN matrix, and the matrix.
struct Accumulators {
    std::array<float*, kWarpgroup> registers;
    unsigned columns;
    std::vector<float> matrix;

    template <class Function>
    void for_each(Function function) {
        for (unsigned thread = 0; thread < kWarpgroup; ++thread)
            for (unsigned i = 0; i < columns / 2; ++i) {
                const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
                const unsigned column = i / 4 * 8 + thread % 4 * 2 + i % 2;
                function(registers[thread][i], matrix[row * columns + column]);
            }
    }
};

struct Product {
    Wgmma operation;  // of thread 0
    std::array<const uint32_t*, kWarpgroup> a_registers;
    std::shared_ptr<Accumulators> accumulators;
    bool done = false;
};

struct Warpgroup {
    bool fenced = false;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::vector<std::shared_ptr<Accumulators>> in_flight;
};
struct Warpgroups {
    Warpgroup of[1024 / kWarpgroup];
};
Warpgroup& warpgroup() { return block_state<Warpgroups>().of[thread() / kWarpgroup]; }

// Fields of a matrix descriptor, in bytes.
struct Descriptor {
    uint32_t address, leading, stride;

    explicit Descriptor(uint64_t bits)
        : address((bits & 0x3fff) << 4),
          leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1) fail("wgmma: only the swizzle of 128 bytes is emulated");
        if (bits >> 49 & 7 || address % 1024 >= 128)
            fail("wgmma: an operand does not start in the first row of the swizzle's pattern");
    }

    // Number k of row (or column) `i`, k contiguous.
    uint32_t k_major(unsigned i, unsigned k) const {
        if (address % 128 + kDepth * 2 > 128) fail("wgmma: an operand leaves its 128 bytes");
        return swizzled(address + i / 8 * stride + i % 8 * 128 + k * 2);
    }
    // The same where i is contiguous.
    uint32_t mn_major(unsigned i, unsigned k) const {
        if (address % 128) fail("wgmma: a transposed operand does not start at a row");
        return swizzled(address + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2);
    }
};

float element(uint32_t address, bool is_bf16) {
    uint16_t bits;
    read_as_async_proxy(address, &bits, 2);
    return is_bf16 ? float_of_bfloat16(bits) : float_of_float16(bits);
}

void execute(Product& product) {
    if (product.done) return;
    product.done = true;
    const Wgmma& operation = product.operation;
    const unsigned columns = operation.columns;
    float a[kRows][kDepth], b[kDepth][kMaxColumns];
    if (operation.a_registers) {
        const auto decode = operation.is_bf16 ? float_of_bfloat16 : float_of_float16;
        for (unsigned thread = 0; thread < kWarpgroup; ++thread)
            for (unsigned i = 0; i < 8; ++i) {
                const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
                const unsigned k = i / 4 * 8 + thread % 4 * 2 + i % 2;
                const uint32_t pair = product.a_registers[thread][i / 2];
                a[row][k] = decode(static_cast<uint16_t>(pair >> i % 2 * 16));
            }
    } else {
        const Descriptor descriptor(operation.a);
        for (unsigned row = 0; row < kRows; ++row)
            for (unsigned k = 0; k < kDepth; ++k)
                a[row][k] = element(descriptor.k_major(row, k), operation.is_bf16);
    }
    const Descriptor descriptor(operation.b);
    for (unsigned k = 0; k < kDepth; ++k)
        for (unsigned column = 0; column < columns; ++column)
            b[k][column] = element(operation.b_is_transposed ? descriptor.mn_major(column, k)
                                                             : descriptor.k_major(column, k),
                                   operation.is_bf16);
    float* matrix = product.accumulators->matrix.data();
    for (unsigned row = 0; row < kRows; ++row, matrix += columns) {
        if (!operation.accumulate) std::fill(matrix, matrix + columns, 0.0f);
        for (unsigned k = 0; k < kDepth; ++k)
            for (unsigned column = 0; column < columns; ++column)
                matrix[column] += a[row][k] * b[k][column];
    }
    counters().tensor_core_flops += 2ull * kRows * columns * kDepth;
}

// Those of an operation that is under way on the same registers, else new ones.
std::shared_ptr<Accumulators> accumulators_of(Warpgroup& group, Wgmma* const* threads) {
    const unsigned columns = threads[0]->columns;
    for (const std::shared_ptr<Accumulators>& known : group.in_flight) {
        if (known->registers[0] != threads[0]->accumulators) continue;
        if (known->columns != columns)
            fail("wgmma: accumulators are under way in a product of another shape");
        return known;
    }
    auto made = std::make_shared<Accumulators>();
    for (unsigned i = 0; i < kWarpgroup; ++i) made->registers[i] = threads[i]->accumulators;
    made->columns = columns;
    made->matrix.resize(kRows * columns);
    made->for_each([](float& held, float& number) {
        number = held;
        held = std::numeric_limits<float>::quiet_NaN();
    });
    group.in_flight.push_back(made);
    return made;
}

}  // namespace

void wgmma(const Wgmma& mine) {
    Wgmma given = mine;
    warpgroup_collective("wgmma", given, [](Wgmma* const* threads) {
        Warpgroup& group = warpgroup();
        const Wgmma& first = *threads[0];
        if (!group.fenced) fail("wgmma: no wgmma.fence since the warpgroup last waited");
        if (first.columns % 8 || first.columns == 0 || first.columns > kMaxColumns)
            fail("wgmma: N is " + std::to_string(first.columns));
        Product product{first, {}, accumulators_of(group, threads)};
        for (unsigned i = 0; i < kWarpgroup; ++i) {
            if (threads[i]->a != first.a || threads[i]->b != first.b ||
                threads[i]->accumulate != first.accumulate)
                fail("wgmma: threads of a warpgroup disagree on its operands");
            product.a_registers[i] = threads[i]->a_registers;
        }
        group.open.push_back(std::move(product));
        if (!ends_early()) return;
        for (std::vector<Product>& products : group.groups)
            for (Product& earlier : products) execute(earlier);
        for (Product& earlier : group.open) execute(earlier);
    });
}

void wgmma_fence() {
    int nothing = 0;
    warpgroup_collective("wgmma.fence", nothing, [](int* const*) { warpgroup().fenced = true; });
}

void wgmma_commit() {
    int nothing = 0;
    warpgroup_collective("wgmma.commit_group", nothing, [](int* const*) {
        warpgroup().groups.push_back(std::move(warpgroup().open));
        warpgroup().open.clear();
    });
}

void wgmma_wait(size_t pending) {
    warpgroup_collective("wgmma.wait_group", pending, [](size_t* const* threads) {
        Warpgroup& group = warpgroup();
        group.fenced = false;
        for (; group.groups.size() > *threads[0]; group.groups.pop_front())
            for (Product& product : group.groups.front()) execute(product);
        // What no product under way writes goes to its registers.
        std::erase_if(group.in_flight, [](const std::shared_ptr<Accumulators>& done) {
            if (done.use_count() > 1) return false;
            done->for_each([](float& held, float& number) { held = number; });
            return true;
        });
    });
}

}  // namespace fastvideo::emulator
