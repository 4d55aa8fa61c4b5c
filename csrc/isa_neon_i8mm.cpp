// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_NEON
#define ZAMBA2_ISA neon_i8mm
#define ZAMBA2_ISA_NAME "neon_i8mm"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kNeonI8mm = &neon_i8mm::table;
}
