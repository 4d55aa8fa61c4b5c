// The kernels of csrc/isa_amx.cpp with AVX-512 and the tile instructions in software.
#include "avx512_stand_in.h"
#define __AVX512BF16__ 1
#include "amx_stand_in.h"
#define __AMX_BF16__ 1
#define ZAMBA2_ISA amx_stand_in
#define ZAMBA2_ISA_NAME "amx_stand_in"
#include "kernels.inc"

namespace zamba2 {
extern const Kernels* const kAmxStandIn;
const Kernels* const kAmxStandIn = &amx_stand_in::table;
}  // namespace zamba2
