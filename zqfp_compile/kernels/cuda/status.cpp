#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace zqfp {
namespace {

thread_local char message[512] = "";

}  // namespace

zqfpStatus fail(zqfpStatus status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

zqfpStatus check_cuda(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return ZQFP_SUCCESS;
  cudaGetLastError();  // a later call must not find this error again
  return fail(ZQFP_CUDA_ERROR, "%s: %s (CUDA error %d)", action, cudaGetErrorString(error), int(error));
}

}  // namespace zqfp

int zqfpGetVersion(void) { return ZQFP_ABI_VERSION; }

const char* zqfpGetLastErrorString(void) { return zqfp::message; }
