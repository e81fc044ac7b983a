// zqfpQuantizeActivation.
#include "check.h"
#include "device.h"
#include "launch.h"
#include "quantize_kernel.cuh"

namespace zqfp {
namespace {

constexpr int kMaxClusterBlocks = 8;

zqfpStatus check_shape(int32_t x_dtype, int64_t m, int64_t k) {
  if (x_dtype < ZQFP_FLOAT16 || x_dtype > ZQFP_FLOAT32) return fail(ZQFP_INVALID_VALUE, "unknown dtype %d", x_dtype);
  ZQFP_RETURN_IF_FAILED(check_tokens(m));
  if (k <= 0 || k > kMaxColumns) {
    return fail(ZQFP_INVALID_VALUE, "k = %lld is not in 1..%lld", (long long)k, (long long)kMaxColumns);
  }
  if (k % 16 != 0) return fail(ZQFP_NOT_SUPPORTED, "k = %lld is not a multiple of 16", (long long)k);
  return ZQFP_SUCCESS;
}

zqfpStatus check_lorc(int32_t x_dtype, const void* v, int32_t rank, const void* xv) {
  if ((v == nullptr) != (xv == nullptr)) return fail(ZQFP_INVALID_VALUE, "v and xv must both be null or both be given");
  if (v == nullptr) return ZQFP_SUCCESS;
  if (rank <= 0) return fail(ZQFP_INVALID_VALUE, "rank = %d is not positive", rank);
  if (rank % 8 != 0 || rank > kMaxRank) {
    return fail(ZQFP_NOT_SUPPORTED, "no kernel for LoRC rank %d: multiples of 8 up to %d", rank, kMaxRank);
  }
  if (x_dtype == ZQFP_FLOAT32) return fail(ZQFP_NOT_SUPPORTED, "no kernel for x @ v in float32: float16 or bfloat16");
  ZQFP_RETURN_IF_FAILED(check_pointer(v, "v"));
  return check_pointer(xv, "xv");
}

const void* choose_kernel(int32_t x_dtype, bool lorc) {
  const void* function = nullptr;
  if (x_dtype == ZQFP_FLOAT32) {
    function = reinterpret_cast<const void*>(&quantize_kernel<float, false>);
  } else if (x_dtype == ZQFP_FLOAT16) {
    function = lorc ? reinterpret_cast<const void*>(&quantize_kernel<__half, true>)
                    : reinterpret_cast<const void*>(&quantize_kernel<__half, false>);
  } else {
    function = lorc ? reinterpret_cast<const void*>(&quantize_kernel<__nv_bfloat16, true>)
                    : reinterpret_cast<const void*>(&quantize_kernel<__nv_bfloat16, false>);
  }
  return function;
}

// As many blocks along K as give every processor one, while each of their warps has a chunk.
int choose_blocks(int64_t m, int64_t k, int processors) {
  const int64_t tiles = (m + kQuantizeTokens - 1) / kQuantizeTokens, chunks = (k + kChunk - 1) / kChunk;
  int blocks = 1;
  while (blocks < kMaxClusterBlocks && tiles * blocks * 2 <= processors && blocks * kQuantizeWarps < chunks) {
    blocks *= 2;
  }
  return blocks;
}

}  // namespace
}  // namespace zqfp

zqfpStatus zqfpQuantizeActivation(const void* x, int32_t x_dtype, int64_t m, int64_t k, const float* scale, void* x8,
                                  float* a, const void* v, int32_t rank, void* xv, void* stream) {
  using namespace zqfp;
  ZQFP_RETURN_IF_FAILED(check_shape(x_dtype, m, k));
  ZQFP_RETURN_IF_FAILED(check_lorc(x_dtype, v, rank, xv));
  if (m == 0) return ZQFP_SUCCESS;
  ZQFP_RETURN_IF_FAILED(check_pointer(x, "x"));
  ZQFP_RETURN_IF_FAILED(check_pointer(x8, "x8"));
  if (scale == nullptr) ZQFP_RETURN_IF_FAILED(check_pointer(a, "a"));
  ZQFP_RETURN_IF_FAILED(check_alignment(scale, "scale"));
  ZQFP_RETURN_IF_FAILED(check_alignment(a, "a"));
  int device = 0, processors = 0;
  ZQFP_RETURN_IF_FAILED(find_device(&device, &processors));
  QuantizeParams p{x, scale, static_cast<uint8_t*>(x8), a, v, xv, int(m), int(k), v == nullptr ? 0 : rank};
  const int blocks = choose_blocks(m, k, processors);
  const LaunchShape shape{(p.m + kQuantizeTokens - 1) / kQuantizeTokens * blocks, kQuantizeWarps * 32, 0, blocks};
  return launch_kernel(choose_kernel(x_dtype, v != nullptr), shape, &p, stream, "launching the quantizer");
}
