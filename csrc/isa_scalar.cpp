// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_ISA scalar
#define ZAMBA2_ISA_NAME "scalar"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kScalar = &scalar::table;
}
