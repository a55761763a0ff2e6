#include "vec_portable.h"
#include "kernels.h"

namespace cats {
extern const Kernels kernels_portable;
const Kernels kernels_portable = make_kernels("portable");
}  // namespace cats
