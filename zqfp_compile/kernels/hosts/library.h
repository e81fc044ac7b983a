// libzqfp, found and opened at run time: a host loads, and computes on the CPU, without it.
#ifndef ZQFP_HOSTS_LIBRARY_H
#define ZQFP_HOSTS_LIBRARY_H

#include <string>

#include "zqfp.h"

namespace zqfp {

// The functions of libzqfp that hosts call.
struct Library {
  decltype(&zqfpGetLastErrorString) lastError = nullptr;
  decltype(&zqfpGetPackedSizes) packedSizes = nullptr;
  decltype(&zqfpGetWorkspaceSize) workspaceSize = nullptr;
  decltype(&zqfpLinear) linear = nullptr;
  decltype(&zqfpQuantizeActivation) quantizeActivation = nullptr;
  decltype(&zqfpQuantizeSiluMul) quantizeSiluMul = nullptr;
  decltype(&zqfpQuantizeRmsNorm) quantizeRmsNorm = nullptr;
  decltype(&zqfpGetQuantizedWorkspaceSize) quantizedWorkspaceSize = nullptr;
  decltype(&zqfpQuantizedLinear) quantizedLinear = nullptr;
};

// Opens libzqfp.so once: $ZQFP_LIBRARY, else the file beside this host, else where the loader looks.
// Throws std::runtime_error, one line, when there is none or it has another ABI version.
const Library& library();

// Throws std::runtime_error with libzqfp's own words unless `status` is ZQFP_SUCCESS.
void check(zqfpStatus status, const char* what);

}  // namespace zqfp

#endif
