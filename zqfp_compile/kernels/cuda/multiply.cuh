// What consumers of both kernels do with a block of the weight, or with a warp's part of it.
#pragma once

#include "decode.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace zqfp {

// A thread's tables from its packed group scales in shared memory.
template <int kGroup>
__device__ __forceinline__ ThreadTables<kGroup> load_tables(uint32_t scales) {
  if constexpr (kGroup == 32) {
    const uint2 words = ptx::load_8(scales);
    return ThreadTables<kGroup>({words.x, words.y});
  } else if constexpr (kGroup == 64) {
    return ThreadTables<kGroup>({ptx::load_4(scales)});
  } else {
    return ThreadTables<kGroup>({ptx::load_2(scales)});
  }
}

// Half a block: two steps of 32 columns, which the tensor core multiplies while the next half is decoded into other
// registers. The half before is done when this returns, and its registers are free.
template <int kColumns, int kGroup>
__device__ __forceinline__ void multiply_half(float (&sums)[kColumns / 2], const uint4& codes,
                                              const ThreadTables<kGroup>& tables, int step, uint64_t tokens,
                                              uint32_t* weights) {
  decode_step<kGroup>(codes.x, codes.y, tables, step, weights);
  decode_step<kGroup>(codes.z, codes.w, tables, step + 1, weights + 4);
  ptx::wgmma_fence();
  Wgmma<kColumns>::e4m3(sums, weights, ptx::descriptor_after(tokens, 32 * step));
  Wgmma<kColumns>::e4m3(sums, weights + 4, ptx::descriptor_after(tokens, 32 * step + 32));
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
}

}  // namespace zqfp
