// The part of CUDA these programs need, through the driver, which is opened at run time: no toolkit to build, and one
// line instead of a loader's message where there is no GPU.
#ifndef ZQFP_EMBED_CUDA_H
#define ZQFP_EMBED_CUDA_H

#include <cstddef>

struct CUstream_st;

namespace zqfp {

// The first GPU, and a stream of its own. Everything below throws Error.
class Gpu {
 public:
  Gpu();
  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  CUstream_st* stream() const { return stream_; }
  void Wait() const;

 private:
  CUstream_st* stream_ = nullptr;
};

// Device memory that grows and does not keep its content when it does. Never empty: TensorRT wants an address.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  // At least `bytes`; nothing that runs may still use the memory.
  void* Reserve(size_t bytes);

  // Copies between the host and the start of the buffer, or `offset` bytes into it, in the stream's order.
  void Upload(const void* from, size_t bytes, const Gpu& gpu);
  void Download(void* to, size_t bytes, size_t offset, const Gpu& gpu) const;

 private:
  unsigned long long address_ = 0;
  size_t bytes_ = 0;
};

}  // namespace zqfp

#endif
