// Launching a kernel by its address.
#pragma once

#include <atomic>
#include <cstdint>

#include "status.h"

namespace zqfp {

constexpr bool kOverlapByDefault = true;

// Whether a kernel may start while the one before it on the stream ends (programmatic dependent launch). zqfpTune.
extern bool overlap_kernels;

struct LaunchShape {
  int blocks;
  int threads;
  int shared_bytes;
  int cluster;  // blocks that form a cluster
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Once per device, of which `done` has a bit each: lets a kernel use so much dynamic shared memory. All kernels leave as
// much of a processor's memory to shared memory as there can be, as the GEMM needs it: where one wants another division,
// the next kernel cannot start before its last block on the processor has ended.
zqfpStatus prepare_once(const void* function, int shared_bytes, int device, std::atomic<uint64_t>* done);

zqfpStatus launch_kernel(const void* function, const LaunchShape& shape, void* params, void* stream,
                         const char* action);

// Launches of this thread so far.
int64_t launch_count();

}  // namespace zqfp
