#include "mapped.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace zamba2 {
namespace {

struct Range {
  std::atomic<uintptr_t> begin{0}, end{0};  // end is 0 while the slot is free or being filled
};
Range ranges[64];
struct sigaction previous;

// Only what a signal handler may do: read atomics, write, _exit.
void on_bus_error(int number, siginfo_t* info, void* context) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Range& range : ranges)
    if (range.begin.load() <= at && at < range.end.load()) {
      constexpr char kShow[] = "\x1b[?25h";  // a progress bar may have hidden the cursor
      constexpr char kSaid[] = "zamba2: the weight file became shorter while it was in use; write or download it again and start anew.\n";
      static std::atomic_flag said = ATOMIC_FLAG_INIT;
      if (said.test_and_set()) for (;;) pause();  // another thread of ours came here first and is ending the process
      if (isatty(2) && write(2, kShow, sizeof kShow - 1) < 0) _exit(2);
      if (write(2, kSaid, sizeof kSaid - 1) < 0) _exit(2);
      _exit(2);
    }
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  } else {
    signal(number, SIG_DFL);  // the faulting instruction runs again and ends the process as it would have without us
  }
}

}  // namespace

GuardMapped::GuardMapped(const uint8_t* begin, const uint8_t* end) {
  static std::once_flag installed;
  std::call_once(installed, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
  for (int i = 0; i < 64; ++i) {
    uintptr_t none = 0;
    if (!ranges[i].begin.compare_exchange_strong(none, reinterpret_cast<uintptr_t>(begin))) continue;
    ranges[i].end.store(reinterpret_cast<uintptr_t>(end));
    slot_ = i;
    return;
  }
}

GuardMapped::~GuardMapped() {
  if (slot_ < 0) return;
  ranges[slot_].end.store(0);
  ranges[slot_].begin.store(0);
}

}  // namespace zamba2
