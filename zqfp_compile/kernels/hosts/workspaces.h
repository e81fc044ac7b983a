// Device memory for zqfpLinear that outlives a call.
//
// The first bytes of a workspace must be zero (ZQFP_WORKSPACE_ZEROED_BYTES). Those of memory a runtime hands out
// per call are not, and zeroing them each time costs a launch per layer. So hosts keep one workspace per stream:
// layers run one after the other on it, and share it whatever their shapes.
//
// The driver API is opened at run time: no CUDA header or library is needed to build a host.
#ifndef ZQFP_HOSTS_WORKSPACES_H
#define ZQFP_HOSTS_WORKSPACES_H

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

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

  // At least `bytes` of memory for `stream`, of the current device, zeroed where it must be. Throws
  // std::runtime_error when it would have to grow while `stream` is captured into a CUDA graph: run once with the
  // largest shape first.
  Buffer get(void* stream, std::size_t bytes);

 private:
  std::mutex mutex_;
  // By context and number of the stream: a handle serves another stream after the first is destroyed, and the handle
  // of the per-thread default stream serves one in each thread.
  std::map<std::pair<void*, unsigned long long>, Buffer> current_;
  // The number that a handle had when it was last seen outside a capture, by context, handle and thread.
  std::map<std::tuple<void*, void*, std::thread::id>, unsigned long long> numbers_;
  // All memory by context, outgrown buffers too: a captured graph may still use them.
  std::vector<std::pair<void*, void*>> owned_;
};

}  // namespace zqfp

#endif
