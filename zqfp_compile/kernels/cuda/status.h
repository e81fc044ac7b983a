// Errors: a code for the caller and a sentence per thread.
#pragma once

#include <cuda_runtime_api.h>

#include "zqfp.h"

namespace zqfp {

// Leaves a printf-style sentence for zqfpGetLastErrorString and returns the code.
zqfpStatus fail(zqfpStatus status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ZQFP_CUDA_ERROR with what failed and CUDA's own words, unless `error` is cudaSuccess.
zqfpStatus check_cuda(cudaError_t error, const char* action);

}  // namespace zqfp

#define ZQFP_RETURN_IF_FAILED(expression)                  \
  do {                                                     \
    const zqfpStatus zqfp_status = (expression);           \
    if (zqfp_status != ZQFP_SUCCESS) return zqfp_status;   \
  } while (false)
