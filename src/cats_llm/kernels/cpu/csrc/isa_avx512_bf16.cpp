#include "vec_avx512.h"
#include "kernels.h"

namespace cats {
extern const Kernels kernels_avx512_bf16;
const Kernels kernels_avx512_bf16 = make_kernels("avx512_bf16");
}  // namespace cats
