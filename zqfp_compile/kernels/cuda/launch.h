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

// Sets an attribute of a kernel once per device; `done` has a bit for each device where it is set.
zqfpStatus set_attribute_once(const void* function, cudaFuncAttribute attribute, int value, int device,
                              std::atomic<uint64_t>* done);

zqfpStatus launch_kernel(const void* function, const LaunchShape& shape, void* params, void* stream,
                         const char* action);

}  // namespace zqfp
