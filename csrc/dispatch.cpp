// The one place where an instruction set is chosen.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace zamba2 {
namespace {

#if defined(__x86_64__)
bool amx_allowed() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

struct Leaf {  // a part of what cpuid says about features
  unsigned a = 7, b, c, d;
  explicit Leaf(unsigned part) : c(part) { __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d)); }
};
bool has_amx() {
  const unsigned d = Leaf(0).d;
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
}
bool has_avx_vnni() { return Leaf(0).a >= 1 && (Leaf(1).a >> 4 & 1); }  // Leaf(0).a: how many parts there are
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__aarch64__) && defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }    // HWCAP2_I8MM
#elif defined(__aarch64__)
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found{kScalar};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(kAvx2);
    if (has_avx_vnni()) found.push_back(kAvxVnni);
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx512) found.push_back(kAvx512);
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) found.push_back(kAvx512Bf16);
  if (bf16 && has_amx() && amx_allowed()) found.push_back(kAmx);
#elif defined(__aarch64__)
  found.push_back(kNeon);
  if (has_dotprod()) found.push_back(kNeonDotprod);
  if (has_dotprod() && has_i8mm()) found.push_back(kNeonI8mm);
#endif
  return found;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* k : available_kernels())
    if (std::string(k->name) == name) return k;
  return nullptr;
}

const Kernels& kernels() {
  const char* wanted = std::getenv("ZAMBA2_ISA");
  if (!wanted || !*wanted) return *available_kernels().back();
  if (const Kernels* found = find_kernels(wanted)) return *found;
  std::string names;
  for (const Kernels* k : available_kernels()) names += std::string(names.empty() ? "" : ", ") + k->name;
  throw std::runtime_error(std::string("ZAMBA2_ISA is '") + wanted + "'; this machine and build have " + names);
}

}  // namespace zamba2
