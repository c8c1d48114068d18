// SPDX-License-Identifier: Apache-2.0
// The scheduler of an emulated block, and what its threads wait for.
#include "emulator/engine.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "emulator/fiber.h"

namespace fastvideo::emulator {

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kBarriers = 16;
// Where the shared window begins, and how much around it tells of stray writes.
constexpr uint32_t kFirstAddress = 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // a NaN in every format

struct Copy {
    uint32_t to;
    const void* from;
    size_t bytes;
};

struct Thread {
    enum State { kReady, kPolling, kMeeting, kDone };

    Fiber fiber;
    uint3 index;
    State state;
    const Condition* condition;  // while polling
    const char* reason;          // of the wait
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open_group;
};

// Threads on their way to one collective.
struct Meeting {
    unsigned first, size;
    uint32_t mask;
    const char* name;
    unsigned arrived = 0, expected = 0;
    std::vector<void*> arguments = {};

    bool has(unsigned thread) const { return arguments[thread - first] != nullptr; }
};

struct Barrier {
    unsigned expected = 0, arrived = 0;
    std::vector<unsigned> waiting;
};

std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

class Block {
  public:
    void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

    unsigned thread() const { return running_; }
    unsigned random(unsigned bound) {
        random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
        return static_cast<unsigned>((random_ >> 33) % bound);
    }
    bool ends_early() { return seed_ != 0 && random(2) == 0; }
    void defer(std::function<void()> effect) { effects_.push_back(std::move(effect)); }
    void* state(std::type_index key, std::shared_ptr<void> (*make)()) {
        std::shared_ptr<void>& found = states_[key];
        if (!found) found = make();
        return found.get();
    }

    unsigned char* shared() { return shared_; }
    size_t shared_bytes() const { return shared_bytes_; }

    void wait_until(const Condition& ready, const char* reason);
    void meet(unsigned first, unsigned size, uint32_t mask, const char* name, void* arguments,
              Act act);
    void barrier(unsigned id, unsigned num_threads, bool wait);
    Thread& current() { return threads_[running_]; }
    void complete(const std::vector<Copy>& group);

  private:
    static void enter();

    void start(uint3 index);
    void run();
    bool run_warp(unsigned warp);
    void resume(unsigned thread);
    bool run_effect();
    void suspend(Thread::State state, const char* reason);
    void check_guards() const;
    [[noreturn]] void report_deadlock();

    std::array<Thread, kMaxThreads> threads_;
    Fiber scheduler_;
    const std::function<void()>* kernel_ = nullptr;
    unsigned num_threads_ = 0, alive_ = 0, running_ = 0;
    uint64_t seed_ = 0, random_ = 0;
    unsigned leave_one_in_ = 0;  // how often a warp that could go on must let others go first
    std::vector<unsigned char> memory_;
    unsigned char* shared_ = nullptr;
    size_t shared_bytes_ = 0;
    std::vector<Meeting> meetings_;
    std::array<Barrier, kBarriers> barriers_;
    std::vector<std::function<void()>> effects_;
    std::unordered_map<std::type_index, std::shared_ptr<void>> states_;
    std::exception_ptr error_;
};

// The one that runs: fibers cannot be handed a pointer, and grids run one after another.
Block* running_block = nullptr;

void Block::launch(dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& kernel) {
    const char* seed = std::getenv("FASTVIDEO_EMULATOR_SEED");
    seed_ = seed ? std::strtoull(seed, nullptr, 10) : 0;
    random_ = seed_ * 0x9e3779b97f4a7c15ull + 1;
    kernel_ = &kernel;
    num_threads_ = block.x * block.y * block.z;
    gridDim = grid;
    blockDim = block;
    shared_bytes_ = shared_bytes;
    memory_.resize(shared_bytes + 2 * kGuardBytes + kFirstAddress);
    void* base = memory_.data() + kGuardBytes;
    size_t space = memory_.size() - kGuardBytes;
    shared_ = static_cast<unsigned char*>(std::align(1024, shared_bytes, base, space));
    ++counters().launches;
    counters().largest_shared_bytes = std::max(counters().largest_shared_bytes, shared_bytes);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                start(uint3{x, y, z});
                run();
                ++counters().blocks;
            }
}

void Block::start(uint3 index) {
    blockIdx = index;
    std::memset(shared_ - kGuardBytes, kPoison, shared_bytes_ + 2 * kGuardBytes);
    meetings_.clear();
    barriers_ = {};
    effects_.clear();
    states_.clear();
    error_ = nullptr;
    alive_ = num_threads_;
    leave_one_in_ = std::array{2u, 8u, ~0u}[random(3)];
    for (unsigned i = 0; i < num_threads_; ++i) {
        Thread& thread = threads_[i];
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        thread.state = Thread::kReady;
        thread.groups.clear();
        thread.open_group.clear();
        thread.fiber.start(&Block::enter);
    }
}

void Block::enter() {
    Block& block = *running_block;
    try {
        (*block.kernel_)();
        Thread& thread = block.current();
        for (const std::vector<Copy>& group : thread.groups)
            thread.open_group.insert(thread.open_group.end(), group.begin(), group.end());
        if (!thread.open_group.empty())
            emulator::fail("the thread ends while its asynchronous copies are under way");
    } catch (...) {
        block.error_ = std::current_exception();
    }
    --block.alive_;
    block.suspend(Thread::kDone, "");
    std::abort();  // a finished thread is never resumed
}

void Block::run() {
    std::vector<unsigned> warps((num_threads_ + kWarp - 1) / kWarp);
    std::iota(warps.begin(), warps.end(), 0);
    while (alive_ > 0) {
        for (size_t i = warps.size(); i > 1; --i)
            std::swap(warps[i - 1], warps[random(static_cast<unsigned>(i))]);
        bool progress = false;
        for (unsigned warp : warps) {
            progress |= run_warp(warp);
            if (error_) std::rethrow_exception(error_);
            if (!effects_.empty() && ends_early()) progress |= run_effect();
        }
        if (!progress && !run_effect()) report_deadlock();
    }
    while (run_effect()) continue;
    check_guards();
}

// Lets each lane go on as far as it can, perhaps several times; false if none can.
bool Block::run_warp(unsigned warp) {
    const unsigned first = warp * kWarp;
    const unsigned lanes = std::min(kWarp, num_threads_ - first);
    const unsigned turn = random(lanes);
    bool ran = false;
    for (bool again = true; again;) {
        again = false;
        for (unsigned i = 0; i < lanes; ++i) {
            const unsigned thread = first + (i + turn) % lanes;
            Thread& candidate = threads_[thread];
            if (candidate.state == Thread::kPolling && (*candidate.condition)())
                candidate.state = Thread::kReady;
            if (candidate.state != Thread::kReady) continue;
            resume(thread);
            if (error_) return true;
            ran = again = true;
        }
        if (random(leave_one_in_) == leave_one_in_ - 1) break;
    }
    return ran;
}

void Block::resume(unsigned thread) {
    running_ = thread;
    threadIdx = threads_[thread].index;
    scheduler_.switch_to(threads_[thread].fiber);
}

void Block::suspend(Thread::State state, const char* reason) {
    Thread& thread = current();
    thread.state = state;
    thread.reason = reason;
    thread.fiber.switch_to(scheduler_);
}

bool Block::run_effect() {
    if (effects_.empty()) return false;
    const unsigned chosen = random(static_cast<unsigned>(effects_.size()));
    const std::function<void()> effect = std::move(effects_[chosen]);
    effects_.erase(effects_.begin() + chosen);
    effect();
    return true;
}

void Block::wait_until(const Condition& ready, const char* reason) {
    if (ready()) return;
    current().condition = &ready;
    suspend(Thread::kPolling, reason);
}

void Block::meet(unsigned first, unsigned size, uint32_t mask, const char* name, void* arguments,
                 Act act) {
    const unsigned place = running_ - first;
    if (size == kWarp && !(mask >> place & 1))
        emulator::fail(std::string(name) + ": the mask does not hold the calling lane");
    if (first + size > num_threads_ && size != kWarp)
        emulator::fail(std::string(name) + ": the block ends within the group of threads");
    auto found = std::find_if(meetings_.begin(), meetings_.end(), [&](const Meeting& meeting) {
        return meeting.first == first && meeting.size == size && (meeting.mask & mask);
    });
    if (found == meetings_.end()) {
        Meeting meeting{first, size, mask, name};
        meeting.expected = size == kWarp ? static_cast<unsigned>(__builtin_popcount(mask)) : size;
        meeting.arguments.resize(size);
        found = meetings_.insert(meetings_.end(), std::move(meeting));
    } else if (found->mask != mask || std::strcmp(found->name, name) != 0) {
        emulator::fail(std::string(name) + " with another mask than, or while others are in, " +
                       found->name);
    }
    found->arguments[place] = arguments;
    if (++found->arrived < found->expected) {
        suspend(Thread::kMeeting, name);
        return;
    }
    const Meeting meeting = std::move(*found);
    meetings_.erase(found);
    act(meeting.arguments.data());
    for (unsigned i = 0; i < size; ++i)
        if (meeting.arguments[i] && first + i != running_)
            threads_[first + i].state = Thread::kReady;
}

void Block::barrier(unsigned id, unsigned num_threads, bool wait) {
    static constexpr std::array<const char*, kBarriers> kNames = {"barrier 0 (__syncthreads)",
                                                                  "barrier 1",
                                                                  "barrier 2",
                                                                  "barrier 3",
                                                                  "barrier 4",
                                                                  "barrier 5",
                                                                  "barrier 6",
                                                                  "barrier 7",
                                                                  "barrier 8",
                                                                  "barrier 9",
                                                                  "barrier 10",
                                                                  "barrier 11",
                                                                  "barrier 12",
                                                                  "barrier 13",
                                                                  "barrier 14",
                                                                  "barrier 15"};
    if (id >= kBarriers || num_threads == 0 || num_threads > num_threads_ ||
        (num_threads % kWarp && num_threads != num_threads_))
        emulator::fail("barrier " + std::to_string(id) + " of " + std::to_string(num_threads) +
                       " threads: there are 16 barriers, of whole warps of the block");
    Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0) barrier.expected = num_threads;
    if (barrier.expected != num_threads)
        emulator::fail(std::string(kNames[id]) + " of " + std::to_string(num_threads) +
                       " threads, while others wait there for " + std::to_string(barrier.expected));
    if (++barrier.arrived < barrier.expected) {
        if (!wait) return;
        barrier.waiting.push_back(running_);
        suspend(Thread::kMeeting, kNames[id]);
        return;
    }
    for (unsigned waiting : barrier.waiting) threads_[waiting].state = Thread::kReady;
    barrier = {};
}

void Block::complete(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        if (copy.from)
            std::memcpy(shared_ + (copy.to - kFirstAddress), copy.from, copy.bytes);
        else
            std::memset(shared_ + (copy.to - kFirstAddress), 0, copy.bytes);
    }
}

void Block::check_guards() const {
    const auto intact = [](const unsigned char* from) {
        return std::all_of(from, from + kGuardBytes, [](unsigned char c) { return c == kPoison; });
    };
    if (!intact(shared_ - kGuardBytes) || !intact(shared_ + shared_bytes_))
        throw std::runtime_error("emulator: block " + text(blockIdx) + " wrote outside of its " +
                                 std::to_string(shared_bytes_) + " bytes of shared memory");
}

void Block::report_deadlock() {
    std::map<std::string, std::vector<unsigned>> waiting;
    for (unsigned i = 0; i < num_threads_; ++i)
        if (threads_[i].state != Thread::kDone) waiting[threads_[i].reason].push_back(i);
    std::string message = "emulator: deadlock in block " + text(blockIdx) + ": ";
    for (const auto& [reason, threads] : waiting)
        message += std::to_string(threads.size()) + " threads wait in " + reason +
                   " (first: " + std::to_string(threads.front()) + "); ";
    throw std::runtime_error(message + std::to_string(num_threads_ - alive_) + " have ended");
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
    const auto refuse = [](const std::string& what) {
        throw std::runtime_error("emulator: launch refused: " + what);
    };
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
        grid.z > 65535)
        refuse("grid " + text({grid.x, grid.y, grid.z}));
    if (uint64_t{block.x} * block.y * block.z == 0 || block.z > 64 ||
        uint64_t{block.x} * block.y * block.z > kMaxThreads)
        refuse("block " + text({block.x, block.y, block.z}));
    if (shared_bytes > kMaxSharedBytes)
        refuse(std::to_string(shared_bytes) + " bytes of shared memory");
}

}  // namespace

Counters& counters() {
    static Counters all;
    return all;
}

void launch_blocks(dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& kernel) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    // Stacks are kept from one launch to the next.
    static Block& instance = *new Block;
    check_launch(grid, block, shared_bytes);
    running_block = &instance;
    instance.launch(grid, block, shared_bytes, kernel);
}

unsigned thread() { return running_block->thread(); }

void fail(const std::string& message) {
    throw std::runtime_error("emulator: block " + text(blockIdx) + " thread " + text(threadIdx) +
                             ": " + message);
}

unsigned random(unsigned bound) { return running_block->random(bound); }
bool ends_early() { return running_block->ends_early(); }
void wait_until(const Condition& ready, const char* reason) {
    running_block->wait_until(ready, reason);
}
void defer(std::function<void()> effect) { running_block->defer(std::move(effect)); }
void* block_state(std::type_index key, std::shared_ptr<void> (*make)()) {
    return running_block->state(key, make);
}

unsigned char* dynamic_shared() { return running_block->shared(); }
size_t shared_bytes() { return running_block->shared_bytes(); }

uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - running_block->shared();
    // One past the end is an address too, though nothing can be read there.
    if (offset < 0 || static_cast<size_t>(offset) > running_block->shared_bytes())
        fail("a pointer that is not into shared memory is taken for one that is");
    return kFirstAddress + static_cast<uint32_t>(offset);
}

unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* what) {
    if (address % alignment)
        fail(std::string(what) + ": shared address " + std::to_string(address) +
             " is not a multiple of " + std::to_string(alignment));
    if (address < kFirstAddress || address - kFirstAddress + bytes > running_block->shared_bytes())
        fail(std::string(what) + ": shared memory from byte " +
             std::to_string(static_cast<int64_t>(address) - kFirstAddress) + " on, but there are " +
             std::to_string(running_block->shared_bytes()));
    return running_block->shared() + (address - kFirstAddress);
}

void meet(unsigned first_thread, unsigned num_threads, uint32_t mask, const char* name,
          void* arguments, Act act) {
    running_block->meet(first_thread, num_threads, mask, name, arguments, act);
}

void barrier(unsigned id, unsigned num_threads, bool wait) {
    running_block->barrier(id, num_threads, wait);
}

void copy_async(uint32_t to, const void* from, size_t bytes, bool valid) {
    shared_pointer(to, bytes, bytes, "cp.async");
    if (valid) {
        check_aligned(from, bytes, "cp.async");
        counters().async_bytes += bytes;
    }
    const Copy copy{to, valid ? from : nullptr, bytes};
    if (ends_early())
        running_block->complete({copy});
    else
        running_block->current().open_group.push_back(copy);
}

void copy_async_commit() {
    Thread& thread = running_block->current();
    thread.groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
}

void copy_async_wait(size_t pending) {
    std::deque<std::vector<Copy>>& groups = running_block->current().groups;
    for (; groups.size() > pending; groups.pop_front()) running_block->complete(groups.front());
}

void copy_async_then(std::function<void()> effect) {
    Thread& thread = running_block->current();
    std::vector<Copy> copies;
    thread.groups.push_back(std::move(thread.open_group));
    thread.open_group.clear();
    for (std::vector<Copy>& group : thread.groups)
        copies.insert(copies.end(), group.begin(), group.end());
    thread.groups.clear();
    defer([copies = std::move(copies), effect = std::move(effect)] {
        running_block->complete(copies);
        effect();
    });
}

}  // namespace fastvideo::emulator
