#include "vec_avx2.h"
#include "kernels.h"

namespace cats {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = make_kernels("avx2");
}  // namespace cats
