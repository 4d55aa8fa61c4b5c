// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_ISA avx512bf16
#define ZAMBA2_ISA_NAME "avx512bf16"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kAvx512Bf16 = &avx512bf16::table;
}
