#include "launch.h"

#include "device.h"

namespace zqfp {

bool overlap_kernels = kOverlapByDefault;

zqfpStatus prepare_once(const void* function, int shared_bytes, int device, std::atomic<uint64_t>* done) {
  const bool remembered = device < kMaxDevices;
  if (remembered && done->load(std::memory_order_relaxed) >> device & 1) return ZQFP_SUCCESS;
  const char* action = "asking for shared memory";
  ZQFP_RETURN_IF_FAILED(check_cuda(
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      action));
  ZQFP_RETURN_IF_FAILED(check_cuda(
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), action));
  if (remembered) done->fetch_or(uint64_t(1) << device, std::memory_order_relaxed);
  return ZQFP_SUCCESS;
}

namespace {
thread_local int64_t launches = 0;
}

int64_t launch_count() { return launches; }

zqfpStatus launch_kernel(const void* function, const LaunchShape& shape, void* params, void* stream,
                         const char* action) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (overlap_kernels) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {params};
  ++launches;
  return check_cuda(cudaLaunchKernelExC(&config, function, arguments), action);
}

}  // namespace zqfp
