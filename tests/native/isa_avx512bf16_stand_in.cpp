// The kernels of csrc/isa_avx512bf16.cpp with AVX-512 in software.
#include "avx512_stand_in.h"
#define __AVX512BF16__ 1
#define ZAMBA2_ISA avx512bf16_stand_in
#define ZAMBA2_ISA_NAME "avx512bf16_stand_in"
#include "kernels.inc"

namespace zamba2 {
extern const Kernels* const kAvx512Bf16StandIn;
const Kernels* const kAvx512Bf16StandIn = &avx512bf16_stand_in::table;
}  // namespace zamba2
