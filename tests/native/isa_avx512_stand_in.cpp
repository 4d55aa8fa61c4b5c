// The kernels of csrc/isa_avx512.cpp with AVX-512 in software.
#include "avx512_stand_in.h"
#define ZAMBA2_ISA avx512_stand_in
#define ZAMBA2_ISA_NAME "avx512_stand_in"
#include "kernels.inc"

namespace zamba2 {
extern const Kernels* const kAvx512StandIn;
const Kernels* const kAvx512StandIn = &avx512_stand_in::table;
}  // namespace zamba2
