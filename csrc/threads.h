// A pool whose workers spin shortly for the next piece of work, then sleep: a decoded token has hundreds of short regions.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zamba2 {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// While it lives, this thread takes denormal numbers as zero: they vanish in any fp32 sum here and slow products down tenfold.
class NoDenormals {
 public:
#if defined(__x86_64__)
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // flush to zero, denormals are zero
  ~NoDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  NoDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (1ull << 24)));
  }
  ~NoDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_ = 0;
#endif
};

// Keeps the calling thread on one processor (Linux; elsewhere, or for -1, does nothing); false if the system refuses.
inline bool pin([[maybe_unused]] int processor) {
#if defined(__linux__)
  if (processor < 0 || processor >= CPU_SETSIZE) return processor < 0;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  return sched_setaffinity(0, sizeof set, &set) == 0;
#else
  return true;
#endif
}

// While it lives, this thread stays on the first of the processors, if there are any; then its own setting is restored.
class Pinned {
 public:
#if defined(__linux__)
  explicit Pinned(const std::vector<int>& processors) : held_(!processors.empty() && sched_getaffinity(0, sizeof before_, &before_) == 0 && pin(processors[0])) {}
  ~Pinned() {
    if (held_) sched_setaffinity(0, sizeof before_, &before_);
  }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  cpu_set_t before_;
  bool held_;
#else
  explicit Pinned(const std::vector<int>&) {}
#endif
};

class Pool {
  static constexpr int kSpins = 2000;  // about 0.1 ms: longer than the gap between two regions, short where cores are busy

 public:
  // processors: one for each thread to stay on, the first for the caller's (see Pinned), or none. Throws std::runtime_error
  // if the system gives no more threads.
  explicit Pool(int threads, const std::vector<int>& processors = {}) : processors_(processors), claims_(static_cast<size_t>(threads)), next_(static_cast<size_t>(threads)) {
    try {
      workers_.reserve(static_cast<size_t>(threads - 1));
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& error) {
      const std::string count = std::to_string(size());
      stop();
      throw std::runtime_error("the system gives " + count + " of " + std::to_string(threads) + " threads (" + error.code().message() + ")");
    }
  }
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }
  const std::vector<int>& processors() const { return processors_; }

  // Calls f(first, last, thread) on contiguous shares of [0, count), on all threads; returns when all are done.
  template <class F>
  void share(int count, F&& f) {
    const int threads = size();
    run([&](int i) {
      const int first = static_cast<int>(static_cast<int64_t>(count) * i / threads);
      const int last = static_cast<int>(static_cast<int64_t>(count) * (i + 1) / threads);
      if (first < last) f(first, last, i);
    });
  }

  // The same in pieces of `grain`: each thread goes through its own share, then helps with what others have left, since cores differ in
  // speed and have other work. A share's pieces come in order, so a stream of weights stays one.
  template <class F>
  void balance(int count, int grain, F&& f) {
    const int threads = size();
    auto border = [&](int i) { return static_cast<int>(static_cast<int64_t>(count) * i / threads); };
    for (int i = 0; i < threads; ++i) next_[static_cast<size_t>(i)].item.store(border(i), std::memory_order_relaxed);
    run([&](int i) {
      for (int k = 0; k < threads; ++k) {
        const int whose = (i + k) % threads, end = border(whose + 1);
        std::atomic<int>& next = next_[static_cast<size_t>(whose)].item;
        for (int first = next.load(std::memory_order_relaxed); first < end && (first = next.fetch_add(grain, std::memory_order_relaxed)) < end;)
          f(first, std::min(first + grain, end), i);
      }
    });
  }

  // Calls f(item, thread) for every item of [0, count), taken in turn by whoever is free.
  template <class F>
  void take(int count, F&& f) {
    std::atomic<int> next{0};
    run([&](int i) {
      for (int item = next.fetch_add(1); item < count; item = next.fetch_add(1)) f(item, i);
    });
  }

 private:
  template <class F>
  void run(F&& f) {
    if (workers_.empty()) return f(0);
    task_ = [](void* context, int i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); };
    context_ = &f;
    left_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    const uint64_t turn = turn_.load(std::memory_order_relaxed) + 1;
    turn_.store(turn, std::memory_order_release);
    turn_.notify_all();
    f(0);
    for (int i = size() - 1; i > 0; --i)  // what no worker has begun: it may have no processor just now, or be none, after a fork
      if (claim(i, turn)) {
        f(i);
        left_.fetch_sub(1, std::memory_order_relaxed);
      }
    for (int spins = 0; left_.load(std::memory_order_acquire) != 0; ++spins)
      if (spins < kSpins) relax();
      else std::this_thread::yield();
  }

  // Whether the i-th part of a turn is the calling thread's to do.
  bool claim(int i, uint64_t turn) {
    uint64_t before = turn - 1;
    return claims_[static_cast<size_t>(i)].turn.compare_exchange_strong(before, turn, std::memory_order_acq_rel);
  }

  void stop() {
    stop_.store(true);
    turn_.fetch_add(1);
    turn_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void work(int i) {
    const NoDenormals plain;
    if (!processors_.empty()) pin(processors_[static_cast<size_t>(i)]);
    uint64_t seen = 0;
    for (;;) {
      for (int spins = 0; turn_.load(std::memory_order_acquire) == seen; ++spins) {
        if (spins < kSpins) relax();
        else turn_.wait(seen, std::memory_order_acquire);
      }
      seen = turn_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      if (!claim(i, seen)) continue;  // the caller has
      task_(context_, i);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  struct alignas(64) Claim {
    std::atomic<uint64_t> turn{0};  // the last one in which somebody began this part
  };

  struct alignas(64) Next {
    std::atomic<int> item{0};  // of this thread's share, not yet taken by anybody
  };

  const std::vector<int> processors_;
  std::vector<Claim> claims_;
  std::vector<Next> next_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> stop_{false};
  void (*task_)(void*, int) = nullptr;
  void* context_ = nullptr;
};

}  // namespace zamba2
