#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>

#include "threads.h"

namespace zamba2 {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kShortest = 0.002;  // seconds of one timing: shorter than the time that a busy system gives in one piece
constexpr int kReadTimings = 3, kProductTimings = 20;  // of which the best counts

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

Reading read_bandwidth(const Kernels& kernels, const uint8_t* data, size_t bytes, int threads) {
  Pool pool(threads);
  std::atomic<uint64_t> sum{0};
  Reading best{0, "", 0};
  for (const int streams : {1, 2, 4})
    for (const size_t ahead : {0, 512, 1024, 2048, 4096, 8192}) {
      int passes = 1;
      for (int timing = 0; timing < kReadTimings;) {
        const Clock::time_point start = Clock::now();
        for (int pass = 0; pass < passes; ++pass) {
          sum = 0;
          pool.share(threads, [&](int first, int last, int) {  // a piece for each thread
            const size_t from = bytes / static_cast<size_t>(threads) * static_cast<size_t>(first) / 64 * 64;
            const size_t to = last == threads ? bytes : bytes / static_cast<size_t>(threads) * static_cast<size_t>(last) / 64 * 64;
            sum ^= kernels.probes->read(data + from, to - from, streams, ahead);
          });
        }
        const double seconds = seconds_since(start);
        if (seconds < kShortest) {
          passes *= 2;
          continue;
        }
        ++timing;
        const double rate = static_cast<double>(bytes) * passes / seconds;
        if (rate > best.bytes_per_second) best = {rate, std::to_string(streams) + " streams a thread, prefetched " + std::to_string(ahead) + " bytes ahead", sum};
      }
    }
  return best;
}

std::vector<std::pair<std::string, double>> product_rates(const Kernels& kernels, int threads) {
  Pool pool(threads);
  std::vector<std::pair<std::string, double>> rates;
  for (const Probes::Loop& loop : kernels.probes->loops) {
    if (!loop.kind) break;
    double best = 0;
    int64_t rounds = 1000;
    for (int timing = 0; timing < kProductTimings;) {
      std::mutex mutex;
      double operations = 0;
      const Clock::time_point start = Clock::now();
      pool.share(threads, [&](int, int, int) {
        volatile float sink = 0;
        const double own = loop.run(rounds, &sink);
        const std::lock_guard<std::mutex> lock(mutex);
        operations += own;
      });
      const double seconds = seconds_since(start);
      if (seconds < kShortest) {
        rounds *= 2;
        continue;
      }
      ++timing;
      best = std::max(best, operations / seconds);
    }
    rates.emplace_back(loop.kind, best);
  }
  return rates;
}

}  // namespace zamba2
