// SPDX-License-Identifier: Apache-2.0
// Fibers: six saved registers on x86-64, ucontext (a system call for each switch) elsewhere.
#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__x86_64__)
// void fastvideo_emulator_switch(void** save, void* load): callee-saved registers go on the stack,
// the two stack pointers change places, and the return address is that of the other fiber.
asm(R"(
    .pushsection .text
    .p2align 4
    .hidden fastvideo_emulator_switch
    .globl fastvideo_emulator_switch
    .type fastvideo_emulator_switch, @function
fastvideo_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fastvideo_emulator_switch, .-fastvideo_emulator_switch
    .popsection
)");
extern "C" void fastvideo_emulator_switch(void** save, void* load);
#endif

namespace fastvideo::emulator {

namespace {

constexpr size_t kStackBytes = 64 * 1024;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void* new_stack() {
    const size_t page = page_bytes();
    void* low = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (low == MAP_FAILED || mprotect(low, page, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(low) + page;
}

}  // namespace

Fiber::~Fiber() {
    if (stack_) munmap(static_cast<char*>(stack_) - page_bytes(), page_bytes() + kStackBytes);
}

#if defined(__x86_64__)

void Fiber::start(void (*entry)()) {
    if (!stack_) stack_ = new_stack();
    // As a call of `entry` leaves it: rsp is 8 past a multiple of 16 once `ret` has popped it.
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + kStackBytes);
    *--top = 0;  // where `entry` would return to: the unwinder stops here
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& to) { fastvideo_emulator_switch(&stack_pointer_, to.stack_pointer_); }

#else

void Fiber::start(void (*entry)()) {
    if (!stack_) stack_ = new_stack();
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& to) { swapcontext(&context_, &to.context_); }

#endif

}  // namespace fastvideo::emulator
