// Quantizer and GEMM in one kernel.
#pragma once

#include "status.h"

namespace zqfp {

// Launches it if it can compute the call and is the fastest way; `launched` says so. All has been checked before.
zqfpStatus launch_joined(const zqfpLinearDesc& desc, const zqfpActivation& x, const zqfpLinearArgs& args, int64_t m,
                         void* stream, bool* launched);

}  // namespace zqfp
