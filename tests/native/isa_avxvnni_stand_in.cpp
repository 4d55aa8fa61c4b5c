// The kernels of csrc/isa_avxvnni.cpp with the one instruction that they have beside AVX2 in software.
#include <immintrin.h>

#include <cstdint>

// As the manual defines VPDPBUSD: every int32 gets four products of an unsigned with a signed byte added, without saturation.
static inline __m256i software_dpbusd(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  alignas(32) int32_t total[8];
  alignas(32) uint8_t u[32];
  alignas(32) int8_t s[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(total), sum);
  _mm256_store_si256(reinterpret_cast<__m256i*>(u), unsigned_bytes);
  _mm256_store_si256(reinterpret_cast<__m256i*>(s), signed_bytes);
  for (int i = 0; i < 32; ++i) total[i / 4] += u[i] * s[i];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(total));
}
#define _mm256_dpbusd_avx_epi32 software_dpbusd
#define __AVXVNNI__ 1
#define ZAMBA2_ISA avxvnni_stand_in
#define ZAMBA2_ISA_NAME "avxvnni_stand_in"
#include "kernels.inc"

namespace zamba2 {
extern const Kernels* const kAvxVnniStandIn;
const Kernels* const kAvxVnniStandIn = &avxvnni_stand_in::table;
}  // namespace zamba2
