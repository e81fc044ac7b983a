#include "library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace zqfp {
namespace {

// The folder of the shared library this code is in, with a slash; "" when it is unknown.
std::string ownFolder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&library), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string path = info.dli_fname;
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

void* open() {
  const char* named = std::getenv("ZQFP_LIBRARY");
  const std::string candidates[] = {named == nullptr ? ownFolder() + "libzqfp.so" : named, "libzqfp.so"};
  std::string reason;
  for (const std::string& path : candidates) {
    if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    if (reason.empty()) reason = dlerror();
    if (named != nullptr) break;
  }
  throw std::runtime_error("zqfp: the CUDA kernels, libzqfp.so, cannot be opened (" + reason +
                           "); put it beside this library (make kernels) or name it in ZQFP_LIBRARY");
}

template <typename Function>
void resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) {
    throw std::runtime_error(std::string("zqfp: libzqfp.so has no ") + name + "; build it again: make kernels");
  }
}

Library load() {
  void* handle = open();
  decltype(&zqfpGetVersion) version = nullptr;
  resolve(handle, "zqfpGetVersion", version);
  if (version() != ZQFP_ABI_VERSION) {
    throw std::runtime_error("zqfp: libzqfp.so has ABI version " + std::to_string(version()) + ", this library needs " +
                             std::to_string(ZQFP_ABI_VERSION) + "; build both from one checkout");
  }
  Library found;
  resolve(handle, "zqfpGetLastErrorString", found.lastError);
  resolve(handle, "zqfpGetPackedSizes", found.packedSizes);
  resolve(handle, "zqfpGetWorkspaceSize", found.workspaceSize);
  resolve(handle, "zqfpLinear", found.linear);
  resolve(handle, "zqfpQuantizeActivation", found.quantizeActivation);
  resolve(handle, "zqfpQuantizeSiluMul", found.quantizeSiluMul);
  resolve(handle, "zqfpQuantizeRmsNorm", found.quantizeRmsNorm);
  resolve(handle, "zqfpGetQuantizedWorkspaceSize", found.quantizedWorkspaceSize);
  resolve(handle, "zqfpQuantizedLinear", found.quantizedLinear);
  return found;
}

}  // namespace

const Library& library() {
  static const Library loaded = load();  // a throw leaves it unset, and the next call tries again
  return loaded;
}

void check(zqfpStatus status, const char* what) {
  if (status == ZQFP_SUCCESS) return;
  throw std::runtime_error(std::string("zqfp: ") + what + ": " + library().lastError());
}

}  // namespace zqfp
