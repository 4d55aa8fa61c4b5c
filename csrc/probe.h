// What the machine gives at best, measured in the process that is judged by it.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace zamba2 {

struct Reading {
  double bytes_per_second;
  std::string pattern;  // how the best of them read
  uint64_t sum;         // XOR of the bytes in words of 8, which shows that all were read
};

// The best rate at which all threads together stream over the bytes, of several patterns and prefetch distances.
Reading read_bandwidth(const Kernels& kernels, const uint8_t* data, size_t bytes, int threads);

// Operations per second (a multiplication and an addition count as two) of every kind of product that the instruction set has,
// in a loop that stays in registers, on all threads.
std::vector<std::pair<std::string, double>> product_rates(const Kernels& kernels, int threads);

}  // namespace zamba2
