// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_ISA avx512
#define ZAMBA2_ISA_NAME "avx512"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kAvx512 = &avx512::table;
}
