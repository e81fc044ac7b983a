// Quantizer and GEMM in one kernel.
#pragma once

#include <cstdint>

#include "status.h"

namespace zqfp {

// Bytes of the sums that blocks leave to each other with LoRC, of at most m tokens.
int64_t joined_bytes(const zqfpLinearDesc& desc, int64_t m);

// Launches it if it can compute the call and is the fastest way; `launched` says so. All has been checked before. The
// counter is 0 between launches.
zqfpStatus launch_joined(const zqfpLinearDesc& desc, const zqfpActivation& x, const zqfpLinearArgs& args, int64_t m,
                         uint32_t* counter, float* sums, void* stream, bool* launched);

}  // namespace zqfp
