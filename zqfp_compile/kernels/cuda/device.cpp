#include "device.h"

#include <atomic>

namespace zqfp {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Asked of the driver at run time: the library is not linked to it and loads without one.
zqfpStatus find_encoder(EncodeTiled* encoder) {
  static std::atomic<EncodeTiled> known{nullptr};
  *encoder = known.load();
  if (*encoder != nullptr) return ZQFP_SUCCESS;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  ZQFP_RETURN_IF_FAILED(check_cuda(error, "asking the driver for cuTensorMapEncodeTiled"));
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    return fail(ZQFP_CUDA_ERROR, "the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
  }
  *encoder = reinterpret_cast<EncodeTiled>(function);
  known.store(*encoder);
  return ZQFP_SUCCESS;
}

zqfpStatus get_attribute(int* value, cudaDeviceAttr attribute, int device) {
  return check_cuda(cudaDeviceGetAttribute(value, attribute, device), "asking for a property of the device");
}

}  // namespace

// Attributes do not change, and asking for them would take microseconds of every launch.
zqfpStatus find_device(int* device, int* processors) {
  static std::atomic<int> known[kMaxDevices];
  ZQFP_RETURN_IF_FAILED(check_cuda(cudaGetDevice(device), "asking for the current device"));
  const bool cached = *device < kMaxDevices;
  *processors = cached ? known[*device].load(std::memory_order_relaxed) : 0;
  if (*processors > 0) return ZQFP_SUCCESS;
  int major = 0, minor = 0;
  ZQFP_RETURN_IF_FAILED(get_attribute(&major, cudaDevAttrComputeCapabilityMajor, *device));
  ZQFP_RETURN_IF_FAILED(get_attribute(&minor, cudaDevAttrComputeCapabilityMinor, *device));
  if (major != 9 || minor != 0) {
    return fail(ZQFP_WRONG_ARCHITECTURE, "device %d has compute capability %d.%d; these kernels need 9.0", *device,
                major, minor);
  }
  ZQFP_RETURN_IF_FAILED(get_attribute(processors, cudaDevAttrMultiProcessorCount, *device));
  if (cached) known[*device].store(*processors, std::memory_order_relaxed);
  return ZQFP_SUCCESS;
}

zqfpStatus make_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, const void* data, int64_t rows,
                    int64_t columns, int box_rows) {
  EncodeTiled encode = nullptr;
  ZQFP_RETURN_IF_FAILED(find_encoder(&encode));
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t stride[1] = {cuuint64_t(columns) * element_bytes};
  const cuuint32_t box[2] = {cuuint32_t(128 / element_bytes), cuuint32_t(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return ZQFP_SUCCESS;
  return fail(ZQFP_CUDA_ERROR, "cuTensorMapEncodeTiled failed with %d for a matrix of %lld x %lld", int(result),
              (long long)rows, (long long)columns);
}

}  // namespace zqfp
