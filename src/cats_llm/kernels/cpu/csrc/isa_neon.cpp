#include "vec_neon.h"
#include "kernels.h"

namespace cats {
extern const Kernels kernels_neon;
const Kernels kernels_neon = make_kernels("neon");
}  // namespace cats
