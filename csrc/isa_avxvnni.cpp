// The kernels for one instruction set; the flags that go with it are in CMakeLists.txt.
#define ZAMBA2_ISA avxvnni
#define ZAMBA2_ISA_NAME "avxvnni"
#include "kernels.inc"

namespace zamba2 {
const Kernels* const kAvxVnni = &avxvnni::table;
}
