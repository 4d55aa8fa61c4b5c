// Weights are read from a mapped file. If that file becomes shorter meanwhile, reading past its new end raises SIGBUS in
// whichever thread reads; nothing can be saved then, but the user is told what happened instead of getting a dump.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zamba2 {

// While it lives, a SIGBUS at an address in [begin, end) ends the process with one sentence and exit code 2. Every other
// SIGBUS goes to the handler that was there before. At most 64 calls are guarded at the same time.
class GuardMapped {
 public:
  GuardMapped(const uint8_t* begin, const uint8_t* end);
  ~GuardMapped();
  GuardMapped(const GuardMapped&) = delete;
  GuardMapped& operator=(const GuardMapped&) = delete;

 private:
  int slot_ = -1;
};

}  // namespace zamba2
