// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_ISA avx2
#define ZAMBA2_ISA_NAME "avx2"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kAvx2 = &avx2::table;
}
