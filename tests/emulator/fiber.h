// Fibers: stacks between which a program switches by itself.
//
// On x86-64 the switch saves the registers that a called function must keep; elsewhere ucontext does, at the price of a
// system call. The address sanitizer is told of every switch.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace trak_fast {
namespace emulator {

struct Fiber {
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Prepares a fiber that runs `entry`, which never returns, on this stack.
void start_fiber(Fiber& fiber, char* stack, size_t size, void (*entry)());

// Leaves `from` for `to`, and returns when `from` is switched to again. last: it never is.
void switch_fiber(Fiber& from, Fiber& to, bool last);

// Completes the switch to a new fiber. Its entry calls this first.
void arrived_in_fiber(void* fake_stack = nullptr);

}  // namespace emulator
}  // namespace trak_fast
