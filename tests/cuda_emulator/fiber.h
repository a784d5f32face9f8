// A fiber: a call stack of its own that is resumed and suspended by hand.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext makes a system call to save the signal mask, ten times the cost of the switch itself. Where we
// know the calling convention we switch by hand. METAFAST_EMULATOR_UCONTEXT forces the portable way, for its
// test.
#if !defined(__x86_64__) || defined(METAFAST_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define METAFAST_EMULATOR_USES_UCONTEXT
#else
extern "C" void metafast_emulator_switch(void** save, void* load) __attribute__((visibility("hidden")));
#endif

namespace metafast::emulator {

class Fiber {
 public:
  using Entry = void (*)();  // must not return: it suspends for the last time with exit()

  // Starts over at `entry` when it is next resumed.
  void prepare(char* stack, std::size_t size, Entry entry) {
    stack_ = stack;
    size_ = size;
#if defined(METAFAST_EMULATOR_USES_UCONTEXT)
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack;
    inside_.uc_stack.ss_size = size;
    inside_.uc_link = nullptr;
    makecontext(&inside_, entry, 0);
#else
    // What metafast_emulator_switch pops: six registers, then the address it returns to. The System V ABI
    // wants the stack pointer to be 8 off a multiple of 16 at the first instruction of a function.
    void** top =
        reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(stack + size) & ~std::uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    inside_ = top;
#endif
#if defined(__SANITIZE_ADDRESS__)
    inside_fake_stack_ = nullptr;
#endif
  }

  // Called from outside: runs the fiber until it suspends.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&outside_fake_stack_, stack_, size_);
#endif
    swap(outside_, inside_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(outside_fake_stack_, nullptr, nullptr);
#endif
  }

  // Called from inside, first thing in the entry.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(inside_fake_stack_, &outside_stack_, &outside_size_);
#endif
  }

  // Called from inside: returns when the fiber is next resumed.
  void suspend() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&inside_fake_stack_, outside_stack_, outside_size_);
#endif
    swap(inside_, outside_);
    entered();
  }

  // Called from inside, never returns.
  void exit() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, outside_stack_, outside_size_);
#endif
    swap(inside_, outside_);
    __builtin_unreachable();
  }

 private:
#if defined(METAFAST_EMULATOR_USES_UCONTEXT)
  using Context = ucontext_t;
  static void swap(Context& save, Context& load) { swapcontext(&save, &load); }
#else
  using Context = void*;  // the stack pointer; everything else lies on the stack
  static void swap(Context& save, Context& load) { metafast_emulator_switch(&save, load); }
#endif

  Context inside_{};
  Context outside_{};
  char* stack_ = nullptr;
  std::size_t size_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* inside_fake_stack_ = nullptr;
  void* outside_fake_stack_ = nullptr;
  const void* outside_stack_ = nullptr;
  std::size_t outside_size_ = 0;
#endif
};

}  // namespace metafast::emulator
