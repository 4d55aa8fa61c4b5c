// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_NEON
#define ZAMBA2_ISA neon_dotprod
#define ZAMBA2_ISA_NAME "neon_dotprod"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kNeonDotprod = &neon_dotprod::table;
}
