// The kernels of csrc/isa_amx.cpp with the tile instructions in software.
#include "amx_stand_in.h"
#define ZAMBA2_ISA amx_stand_in
#define ZAMBA2_ISA_NAME "amx_stand_in"
#include "kernels.inc"

namespace zamba2 {
extern const Kernels* const kAmxStandIn;
const Kernels* const kAmxStandIn = &amx_stand_in::table;
}  // namespace zamba2
