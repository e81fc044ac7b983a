// Which kernel computes a call and how its work is dealt out. Pure arithmetic on the host.
#pragma once

#include "kernels.h"
#include "schedule.h"
#include "zqfp.h"

namespace zqfp {

// A bound on multiprocessors, so that the workspace does not depend on the device; the full chip has 144.
constexpr int kMaxProcessors = 144;

enum class Cut { kAuto, kNever, kAlways };

// What zqfpTune overrides; kernel < 0 is the plan's own choice.
struct Tuning {
  int kernel = -1;
  Cut cut = Cut::kAuto;
};

// Of kernels of strips the schedule says how many there are, and of blocks (workers) and tiles of tokens.
struct Plan {
  const Kernel* kernel;
  Schedule schedule;
};

// kernel is null where the one that is wanted cannot compute the layer.
Plan make_plan(const zqfpLinearDesc& desc, int64_t m, int processors, const Tuning& tuning);

// Of zqfpQuantizedLinear: kernel is null where the quantizer has one of its own.
Plan make_quantized_plan(const zqfpLinearDesc& desc, int64_t m, int processors, const Tuning& tuning);

// A launch's shared memory: what a kernel of strips has, and what depends on the layer.
int64_t strip_shared_bytes(const Kernel& kernel, const zqfpLinearDesc& desc);

// Whether all of a schedule's numbers fit in the kernel's integers.
bool plan_fits(const zqfpLinearDesc& desc, int64_t m);

// Arrival counters in the zeroed bytes, then partial sums.
size_t workspace_bytes(const zqfpLinearDesc& desc, int64_t m, const Tuning& tuning);

}  // namespace zqfp
