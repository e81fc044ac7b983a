// Launching a kernel by its address.
#pragma once

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

zqfpStatus launch_kernel(const void* function, const LaunchShape& shape, void* params, void* stream,
                         const char* action);

}  // namespace zqfp
