// All quantizers as one.
#pragma once

#include "status.h"

namespace zqfp {

// x8 and a, and x @ v where the activation has v, as zqfp.h says of zqfpQuantizeActivation and the others.
zqfpStatus quantize_activation(const zqfpActivation& x, int64_t m, int64_t k, void* x8, float* a, int32_t rank, void* xv,
                               void* stream);

}  // namespace zqfp
