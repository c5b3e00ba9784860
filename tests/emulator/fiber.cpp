// The switch of stacks, in assembly for x86-64 and by ucontext elsewhere.
#include "fiber.h"

namespace trak_fast {
namespace emulator {
namespace {

Fiber* came_from;

}  // namespace

#if defined(__x86_64__)
extern "C" void trak_fast_switch_stack(void** from, void* to);
__asm__(
    ".text\n"
    ".type trak_fast_switch_stack, @function\n"
    "trak_fast_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size trak_fast_switch_stack, . - trak_fast_switch_stack\n");
#endif

void start_fiber(Fiber& fiber, char* stack, size_t size, void (*entry)()) {
  fiber.stack_bottom = stack;
  fiber.stack_size = size;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, size);  // a launch that failed leaves frames behind
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // in place of a return address
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {stack, 0, size};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void arrived_in_fiber([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &came_from->stack_bottom, &came_from->stack_size);
#endif
}

__attribute__((no_sanitize("address"))) void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
  came_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#if defined(__x86_64__)
  trak_fast_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_in_fiber(from.fake_stack);
}

}  // namespace emulator
}  // namespace trak_fast
