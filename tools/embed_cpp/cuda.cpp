#include "cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace zqfp {
namespace {

// A function of the driver. Throws Error.
void* Symbol(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(Exit::kEnvironment, "there is no CUDA driver here (libcuda.so.1): an engine needs an NVIDIA GPU");
  }
  void* const found = dlsym(library, name);
  if (found == nullptr) throw Error(Exit::kEnvironment, std::string("the CUDA driver has no ") + name + "; update it");
  return found;
}

// Calls a function of the driver; the arguments must be of the types that the driver's header, cuda.h, declares.
template <typename... Arguments>
int Result(const char* name, Arguments... arguments) {
  return reinterpret_cast<int (*)(Arguments...)>(Symbol(name))(arguments...);
}

// The same, for functions that have to succeed. Throws Error, with what it was for.
template <typename... Arguments>
void Call(const std::string& what, const char* name, Arguments... arguments) {
  const int result = Result(name, arguments...);
  if (result == 0) return;
  const char* text = nullptr;
  Result("cuGetErrorString", result, &text);
  throw Error(Exit::kEnvironment, "CUDA cannot " + what + ": " + (text == nullptr ? std::to_string(result) : text));
}

}  // namespace

Gpu::Gpu() {
  int device = 0;
  void* context = nullptr;  // the one the CUDA runtime inside TensorRT uses; it lives as long as the process
  Call("start", "cuInit", 0u);
  Call("find a GPU", "cuDeviceGet", &device, 0);
  Call("open the GPU", "cuDevicePrimaryCtxRetain", &context, device);
  Call("use the GPU", "cuCtxSetCurrent", context);
  const unsigned not_with_stream_zero = 1;
  Call("make a stream", "cuStreamCreate", &stream_, not_with_stream_zero);
}

Gpu::~Gpu() { Result("cuStreamDestroy_v2", stream_); }

void Gpu::Wait() const { Call("finish a step", "cuStreamSynchronize", stream_); }

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (address_ != 0) Result("cuMemFree_v2", address_);
}

void* DeviceBuffer::Reserve(size_t bytes) {
  if (address_ == 0 || bytes > bytes_) {
    if (address_ != 0) Call("free memory", "cuMemFree_v2", std::exchange(address_, 0));
    bytes_ = std::max({bytes, 2 * bytes_, size_t{256}});  // doubled, since a cache grows with every token
    Call("allocate " + std::to_string(bytes_) + " bytes on the GPU", "cuMemAlloc_v2", &address_, bytes_);
  }
  return reinterpret_cast<void*>(address_);
}

void DeviceBuffer::Upload(const void* from, size_t bytes, const Gpu& gpu) {
  Reserve(bytes);
  Call("copy to the GPU", "cuMemcpyHtoDAsync_v2", address_, from, bytes, gpu.stream());
}

void DeviceBuffer::Download(void* to, size_t bytes, size_t offset, const Gpu& gpu) const {
  Call("copy from the GPU", "cuMemcpyDtoHAsync_v2", to, address_ + offset, bytes, gpu.stream());
}

}  // namespace zqfp
