#include "vec_avx512.h"
#include "kernels.h"

namespace cats {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = make_kernels("avx512");
}  // namespace cats
