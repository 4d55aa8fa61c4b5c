// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_ISA amx
#define ZAMBA2_ISA_NAME "amx"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kAmx = &amx::table;
}
