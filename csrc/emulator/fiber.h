// SPDX-License-Identifier: Apache-2.0
// Stacks of their own for the threads of an emulated block, switched by hand.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastvideo::emulator {

// One flow of control. A default-made one stands for the stack that is running already.
class Fiber {
  public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber();

    // Begins anew with `entry`, which must never return, at the next switch to it.
    void start(void (*entry)());

    // Goes on with `to` until something switches back here.
    void switch_to(Fiber& to);

  private:
    void* stack_ = nullptr;  // lowest byte; the page below it is never accessible
#if defined(__x86_64__)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
};

}  // namespace fastvideo::emulator
