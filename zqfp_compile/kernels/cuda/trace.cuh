// What a kernel's warpgroups do when, for tools/trace_gemm.py: stamps of the multiprocessor's clock. Without TRACE=1
// (Makefile) they are nothing.
#pragma once

#include <cstdint>

namespace zqfp {

// The order of STEPS in tools/trace_gemm.py.
enum class Step { kEntered, kMet, kTile, kData, kMultiplied, kSlices, kShared, kStored, kWeights };

constexpr int kTraceBlocks = 132, kTraceWarpgroups = 5, kTraceStamps = 32;

#ifdef ZQFP_TRACE
static __device__ uint64_t trace_stamps[kTraceBlocks][kTraceWarpgroups][kTraceStamps];

// Of the first thread of a warpgroup.
class Trace {
 public:
  __device__ __forceinline__ void stamp(Step step) {
    if (threadIdx.x % 128 != 0 || next_ == kTraceStamps || blockIdx.x >= kTraceBlocks) return;
    trace_stamps[blockIdx.x][threadIdx.x / 128][next_++] = uint64_t(clock64()) << 8 | uint64_t(step);
  }

 private:
  int next_ = 0;
};
#else
class Trace {
 public:
  __device__ __forceinline__ void stamp(Step) {}
};
#endif

}  // namespace zqfp
