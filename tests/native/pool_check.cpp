// Exits with 1 and a sentence where csrc/threads.h breaks a law: what tests/test_pool.py compiles and runs.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "threads.h"

using zamba2::Pool;

namespace {

void need(bool holds, const char* law, int threads, int count, int grain) {
  if (holds) return;
  std::printf("%s: %d threads, %d items, %d at once\n", law, threads, count, grain);
  std::exit(1);
}

// Takes items, and remembers who took which; each index of a thread is one caller's at a time, since memory to work in goes by it.
struct Taken {
  Taken(int threads, int count) : times(new std::atomic<int>[static_cast<size_t>(count) + 1]()), whose(static_cast<size_t>(count)), inside(new std::atomic<int>[static_cast<size_t>(threads)]()) {}
  void take(int first, int last, int thread) {
    if (inside[static_cast<size_t>(thread)].fetch_add(1) != 0) alone = false;
    for (int i = first; i < last; ++i) {
      times[static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed);
      whose[static_cast<size_t>(i)] = thread;  // a plain write, which a sanitizer would see twice
    }
    inside[static_cast<size_t>(thread)].fetch_sub(1);
  }
  std::unique_ptr<std::atomic<int>[]> times;
  std::vector<int> whose;
  std::unique_ptr<std::atomic<int>[]> inside;
  std::atomic<bool> alone{true};
};

void check(Pool& pool, int count, int grain, int way) {
  Taken taken(pool.size(), count);
  std::atomic<bool> sizes{true};
  auto part = [&](int first, int last, int thread) {
    if (first < 0 || first >= last || last > count || (way == 0 && last - first > grain)) sizes = false;
    else taken.take(first, last, thread);
  };
  if (way == 0) pool.balance(count, grain, part);
  else if (way == 1) pool.share(count, part);
  else pool.take(count, [&](int item, int thread) { part(item, item + 1, thread); });
  need(sizes, "a piece is empty, too large or out of range", pool.size(), count, grain);
  need(taken.alone, "two callers have one thread's index", pool.size(), count, grain);
  for (int i = 0; i < count; ++i) need(taken.times[static_cast<size_t>(i)] == 1, "an item is not taken once", pool.size(), count, grain);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 5}) {
    Pool pool(threads);
    for (int round = 0; round < 20; ++round)
      for (int count : {0, 1, 2, 3, 7, 64, 1001})
        for (int grain : {1, 3, 4, 2000})
          for (int way = 0; way < 3; ++way) check(pool, count, grain, way);
  }
  // One thread takes 40 ms an item, whichever begins first; the others do the rest meanwhile, its own share's too.
  Pool pool(3);
  constexpr int kItems = 60;
  std::atomic<int> slow{-1};
  std::vector<int> whose(kItems);
  pool.balance(kItems, 1, [&](int first, int, int thread) {
    int nobody = -1;
    if (slow.compare_exchange_strong(nobody, thread) || nobody == thread) std::this_thread::sleep_for(std::chrono::milliseconds(40));
    else std::this_thread::sleep_for(std::chrono::milliseconds(1));
    whose[static_cast<size_t>(first)] = thread;
  });
  int by_slow = 0;
  for (int thread : whose) by_slow += thread == slow;
  need(by_slow < kItems / 6, "a slow thread is left with its share", 3, kItems, 1);
  return 0;
}
