#include "workspaces.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "zqfp.h"

namespace zqfp {
namespace {

// The driver's functions as its header declares them; a device pointer is as wide as a pointer here.
using DevicePointer = unsigned long long;
struct Driver {
  int (*currentContext)(void** context) = nullptr;
  int (*pushContext)(void* context) = nullptr;
  int (*popContext)(void** context) = nullptr;
  int (*allocate)(DevicePointer* pointer, std::size_t bytes) = nullptr;
  int (*release)(DevicePointer pointer) = nullptr;
  int (*fill)(DevicePointer pointer, unsigned char value, std::size_t bytes, void* stream) = nullptr;
  int (*captureStatus)(void* stream, int* status) = nullptr;
  int (*streamId)(void* stream, unsigned long long* id) = nullptr;
};

template <typename Function>
void resolve(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  if (function == nullptr) throw std::runtime_error(std::string("zqfp: the CUDA driver has no ") + name);
}

Driver load() {
  void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error("zqfp: there is no CUDA driver here (libcuda.so.1)");
  Driver driver;
  resolve(handle, "cuCtxGetCurrent", driver.currentContext);
  resolve(handle, "cuCtxPushCurrent_v2", driver.pushContext);
  resolve(handle, "cuCtxPopCurrent_v2", driver.popContext);
  resolve(handle, "cuMemAlloc_v2", driver.allocate);
  resolve(handle, "cuMemFree_v2", driver.release);
  resolve(handle, "cuMemsetD8Async", driver.fill);
  resolve(handle, "cuStreamIsCapturing", driver.captureStatus);
  resolve(handle, "cuStreamGetId", driver.streamId);
  return driver;
}

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

void check(int result, const char* what) {
  if (result != 0) {
    throw std::runtime_error(std::string("zqfp: CUDA error ") + std::to_string(result) + " while " + what);
  }
}

void* currentContext() {
  void* context = nullptr;
  check(driver().currentContext(&context), "asking for the current context");
  return context;
}

// The one handle that is another stream in each thread; for all others no thread.
std::thread::id threadOf(void* stream) {
  constexpr std::uintptr_t kPerThread = 2;  // CU_STREAM_PER_THREAD
  return reinterpret_cast<std::uintptr_t>(stream) == kPerThread ? std::this_thread::get_id() : std::thread::id();
}

}  // namespace

std::shared_ptr<Workspaces> Workspaces::shared() {
  static std::mutex mutex;
  static std::weak_ptr<Workspaces> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto pool = known.lock();
  if (pool == nullptr) known = pool = std::make_shared<Workspaces>();
  return pool;
}

Workspaces::~Workspaces() {
  for (const auto& [context, data] : owned_) {
    // At the end of a process the context may be gone, and the memory with it.
    if (driver().pushContext(context) != 0) continue;
    driver().release(reinterpret_cast<DevicePointer>(data));
    driver().popContext(nullptr);
  }
}

Buffer Workspaces::get(void* stream, std::size_t bytes) {
  if (bytes == 0) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  void* context = currentContext();
  int capturing = 0;
  check(driver().captureStatus(stream, &capturing), "looking at the stream");
  // Asking a captured stream for its number ends the capture: what its handle stood for before it has to do.
  unsigned long long& id = numbers_[{context, stream, threadOf(stream)}];
  if (capturing == 0) check(driver().streamId(stream, &id), "asking for a stream's number");
  Buffer& buffer = current_[{context, id}];
  if (buffer.bytes >= bytes) return buffer;
  if (capturing != 0) {
    throw std::runtime_error("zqfp: a workspace would have to grow while a CUDA graph is captured; run once with "
                             "the largest shape before capturing");
  }
  // By doubling, so that growing shapes do not leave a buffer each.
  const std::size_t size = std::max(bytes, 2 * buffer.bytes);
  DevicePointer pointer = 0;
  check(driver().allocate(&pointer, size), "allocating a workspace");
  owned_.emplace_back(context, reinterpret_cast<void*>(pointer));
  const std::size_t zeroed = std::min<std::size_t>(size, ZQFP_WORKSPACE_ZEROED_BYTES);
  check(driver().fill(pointer, 0, zeroed, stream), "clearing a workspace");
  buffer = {reinterpret_cast<void*>(pointer), size};
  return buffer;
}

}  // namespace zqfp
