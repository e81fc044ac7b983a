// Device memory for zqfpLinear that outlives a call.
//
// The ABI wants a workspace that is zeroed once. What a runtime hands out per call is not, and zeroing it each
// time costs a launch per layer. So hosts keep one workspace per stream and kind of layer: layers of one kind
// run one after the other on a stream, and share it.
//
// The driver API is opened at run time: no CUDA header or library is needed to build a host.
#ifndef ZQFP_HOSTS_WORKSPACES_H
#define ZQFP_HOSTS_WORKSPACES_H

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "zqfp.h"

namespace zqfp {

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
};

class Workspaces {
 public:
  // The one pool of the process; it lives as long as somebody holds it, and frees its memory then.
  static std::shared_ptr<Workspaces> shared();

  ~Workspaces();

  // At least `bytes` of zeroed memory for layers like `desc` on `stream`, of the current device.
  // Throws std::runtime_error when it would have to grow while `stream` is captured into a CUDA graph: run once
  // with the largest shape first.
  Buffer get(const zqfpLinearDesc& desc, void* stream, std::size_t bytes);

 private:
  using Kind = std::tuple<void*, void*, int64_t, int64_t, int32_t, int32_t, int32_t, int32_t>;

  std::mutex mutex_;
  std::map<Kind, Buffer> current_;
  // All memory by context, outgrown buffers too: a captured graph may still use them.
  std::vector<std::pair<void*, void*>> owned_;
};

}  // namespace zqfp

#endif
