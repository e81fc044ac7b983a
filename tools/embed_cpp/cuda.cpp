#include "cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace zqfp {
namespace {

using Address = unsigned long long;

// The functions as the driver's header, cuda.h, declares them.
struct Driver {
  int (*init)(unsigned flags);
  int (*device)(int* device, int ordinal);
  int (*retain)(void** context, int device);
  int (*makeCurrent)(void* context);
  int (*createStream)(CUstream_st** stream, unsigned flags);
  int (*destroyStream)(CUstream_st* stream);
  int (*wait)(CUstream_st* stream);
  int (*allocate)(Address* address, size_t bytes);
  int (*release)(Address address);
  int (*upload)(Address to, const void* from, size_t bytes, CUstream_st* stream);
  int (*download)(void* to, Address from, size_t bytes, CUstream_st* stream);
  int (*explain)(int result, const char** text);
};

template <typename Function>
void Resolve(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw Error(Exit::kEnvironment, std::string("the CUDA driver has no ") + name + "; update it");
}

Driver Load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(Exit::kEnvironment, "there is no CUDA driver here (libcuda.so.1): an engine needs an NVIDIA GPU");
  }
  Driver driver;
  Resolve(library, "cuInit", driver.init);
  Resolve(library, "cuDeviceGet", driver.device);
  Resolve(library, "cuDevicePrimaryCtxRetain", driver.retain);
  Resolve(library, "cuCtxSetCurrent", driver.makeCurrent);
  Resolve(library, "cuStreamCreate", driver.createStream);
  Resolve(library, "cuStreamDestroy_v2", driver.destroyStream);
  Resolve(library, "cuStreamSynchronize", driver.wait);
  Resolve(library, "cuMemAlloc_v2", driver.allocate);
  Resolve(library, "cuMemFree_v2", driver.release);
  Resolve(library, "cuMemcpyHtoDAsync_v2", driver.upload);
  Resolve(library, "cuMemcpyDtoHAsync_v2", driver.download);
  Resolve(library, "cuGetErrorString", driver.explain);
  return driver;
}

const Driver& Loaded() {
  static const Driver driver = Load();
  return driver;
}

void Check(int result, const std::string& what) {
  if (result == 0) return;
  const char* text = nullptr;
  Loaded().explain(result, &text);
  throw Error(Exit::kEnvironment, "CUDA cannot " + what + ": " + (text == nullptr ? std::to_string(result) : text));
}

}  // namespace

Gpu::Gpu() {
  const Driver& driver = Loaded();
  int device = 0;
  void* context = nullptr;  // the one the CUDA runtime inside TensorRT uses; it lives as long as the process
  Check(driver.init(0), "start");
  Check(driver.device(&device, 0), "find a GPU");
  Check(driver.retain(&context, device), "open the GPU");
  Check(driver.makeCurrent(context), "use the GPU");
  const unsigned notWithStreamZero = 1;
  Check(driver.createStream(&stream_, notWithStreamZero), "make a stream");
}

Gpu::~Gpu() { Loaded().destroyStream(stream_); }

void Gpu::Wait() const { Check(Loaded().wait(stream_), "finish a step"); }

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (address_ != 0) Loaded().release(address_);
}

void* DeviceBuffer::Reserve(size_t bytes) {
  if (address_ == 0 || bytes > bytes_) {
    if (address_ != 0) Check(Loaded().release(std::exchange(address_, 0)), "free memory");
    bytes_ = std::max({bytes, 2 * bytes_, size_t{256}});  // doubled, since a cache grows with every token
    Check(Loaded().allocate(&address_, bytes_), "allocate " + std::to_string(bytes_) + " bytes on the GPU");
  }
  return reinterpret_cast<void*>(address_);
}

void DeviceBuffer::Upload(const void* from, size_t bytes, const Gpu& gpu) {
  Reserve(bytes);
  Check(Loaded().upload(address_, from, bytes, gpu.stream()), "copy to the GPU");
}

void DeviceBuffer::Download(void* to, size_t bytes, size_t offset, const Gpu& gpu) const {
  Check(Loaded().download(to, address_ + offset, bytes, gpu.stream()), "copy from the GPU");
}

}  // namespace zqfp
