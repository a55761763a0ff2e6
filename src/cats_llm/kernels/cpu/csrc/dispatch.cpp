#include "api.h"

namespace cats {

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_neon;

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

const Isa kIsas[] = {
    {&kernels_portable, always},
#if defined(__x86_64__)
    {&kernels_avx2, has_avx2},
    {&kernels_avx512, has_avx512},
    {&kernels_avx512_bf16, has_avx512_bf16},
#elif defined(__aarch64__)
    {&kernels_neon, always},
#endif
};
const int kIsaCount = sizeof kIsas / sizeof kIsas[0];

}  // namespace cats
