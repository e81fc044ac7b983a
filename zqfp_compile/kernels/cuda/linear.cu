// zqfpLinear and what belongs to it: plan, workspace, launch.
#include <algorithm>

#include "check.h"
#include "config.h"
#include "device.h"
#include "launch.h"
#include "launch_joined.h"
#include "params.h"
#include "plan.h"
#include "strips.h"
#include "tuning.h"

namespace zqfp {
namespace {

Tuning tuning;

zqfpStatus fill_maps(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, const Kernel& kernel,
                     GemmParams* p) {
  // Clearing tokens that there are not takes longer than copying them.
  p->box_tokens = int(kernel.cluster > 1 ? kernel.tokens / kernel.cluster : std::min<int64_t>(m, kernel.tokens));
  ZQFP_RETURN_IF_FAILED(make_map(&p->x8, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.x8, m, desc.k, p->box_tokens));
  if (desc.lorc_rank == 0) return ZQFP_SUCCESS;
  const CUtensorMapDataType type =
      desc.dtype == ZQFP_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  ZQFP_RETURN_IF_FAILED(make_map(&p->xv, type, 2, args.xv, m, desc.lorc_rank, p->box_tokens));
  return make_map(&p->u, type, 2, args.u, desc.lorc_rank, desc.n, kLorcStep);
}

static_assert(kMaxOutputs == ZQFP_MAX_OUTPUTS && kOutputRows == kBlockRows, "kernel and interface");

void fill_outputs(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, LinearParams* p) {
  int row = 0;
  for (int i = 0; i < kMaxOutputs; ++i) {
    const int64_t n = i == 0 && desc.outputs[0] == 0 ? desc.n : desc.outputs[i];
    p->outputs[i] = {args.y[i], n == 0 ? p->row_blocks : row / kBlockRows, int(desc.gated ? n / 2 : n)};
    row += int(n);
  }
}

void fill_params(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, LinearParams* p) {
  p->codes = static_cast<const uint8_t*>(args.codes);
  p->group_scales = static_cast<const uint8_t*>(args.group_scales);
  p->row_scales = args.row_scales;
  p->a = args.a;
  p->bias = args.bias;
  p->m = int(m);
  p->n = int(desc.n);
  p->row_blocks = int(divide_up(desc.n, kBlockRows));
  p->k_blocks = int(divide_up(desc.k, kBlockColumns));
  p->per_token = desc.per_token != 0;
  p->gated = desc.gated != 0;
  p->bfloat = desc.dtype == ZQFP_BFLOAT16;
  fill_outputs(desc, args, p);
}

zqfpStatus launch_gemm(const Kernel& kernel, int blocks, int shared_bytes, int device, void* params, void* stream) {
  ZQFP_RETURN_IF_FAILED(prepare_once(kernel.function, kernel.strips ? kMaxSharedBytes : kernel.shared_bytes, device,
                                     kernel.prepared));
  const LaunchShape shape{blocks, kernel.threads, shared_bytes, kernel.gang()};
  return launch_kernel(kernel.function, shape, params, stream, "launching the GEMM");
}

void fill_strip_params(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, const Schedule& schedule,
                       StripParams* p) {
  fill_params(desc, args, m, p);
  p->columns = slice_blocks(p->k_blocks);
  p->strips = schedule.row_tiles;
  p->blocks = schedule.workers;
  p->by_blocks = FastDivisor::of(p->blocks);
}

zqfpStatus launch_given_strips(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, const Plan& plan,
                               int device, void* stream) {
  StripParams p{};
  p.box_tokens = int(std::min<int64_t>(m, 8));
  ZQFP_RETURN_IF_FAILED(make_map(&p.x8, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.x8, m, desc.k, p.box_tokens));
  fill_strip_params(desc, args, m, plan.schedule, &p);
  p.xv = args.xv;
  p.u = args.u;
  p.rank = desc.lorc_rank;
  return launch_gemm(*plan.kernel, p.blocks * plan.schedule.token_tiles,
                     int(strip_shared_bytes(*plan.kernel, desc)), device, &p, stream);
}

zqfpStatus launch_tiles(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, const Plan& plan, int device,
                        void* workspace, void* stream) {
  GemmParams p{};
  ZQFP_RETURN_IF_FAILED(fill_maps(desc, args, m, *plan.kernel, &p));
  fill_params(desc, args, m, &p);
  p.arrivals = static_cast<uint32_t*>(workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + ZQFP_WORKSPACE_ZEROED_BYTES);
  p.schedule = plan.schedule;
  p.lorc_steps = int(divide_up(desc.lorc_rank, kLorcStep));
  return launch_gemm(*plan.kernel, plan.schedule.workers * plan.kernel->gang(), plan.kernel->shared_bytes, device, &p,
                     stream);
}

zqfpStatus no_kernel(const zqfpLinearDesc& desc) {
  return fail(ZQFP_NOT_SUPPORTED, "the kernel that zqfpTune asks for cannot have k = %lld", (long long)desc.k);
}

zqfpStatus check_plan(const zqfpLinearDesc& desc, int64_t m) {
  if (plan_fits(desc, m)) return ZQFP_SUCCESS;
  return fail(ZQFP_NOT_SUPPORTED, "%lld x %lld for %lld tokens is more than the kernels count", (long long)desc.n,
              (long long)desc.k, (long long)m);
}

// The last launch of a thread, if it was one that quantises.
struct Predecessor {
  int64_t count = 0;  // launch_count() after it
  const void* stream;
  int blocks, shared_bytes;
  Output outputs[kMaxOutputs];
};
thread_local Predecessor predecessor;

// Shared memory of the last launch, if it makes x, so that no other kernel comes between, and has a block on each
// processor; else 0.
int bytes_before(const zqfpActivation& x, const void* stream, int blocks) {
  const Predecessor& last = predecessor;
  if (last.count != launch_count() || last.stream != stream || last.blocks < blocks) return 0;
  const bool makes_x = std::any_of(last.outputs, last.outputs + kMaxOutputs, [&](const Output& output) {
    return output.y != nullptr && (output.y == x.x || output.y == x.other);
  });
  return makes_x ? last.shared_bytes : 0;
}

// A norm's sum that takes the place of what other blocks are still reading must be another kernel's.
bool can_join(const zqfpLinearDesc& desc, const zqfpActivation& x) {
  const bool in_place = x.sum != nullptr && (x.sum == x.x || x.sum == x.other);
  return x.x_dtype == desc.dtype && !in_place;
}

constexpr int64_t kMostJoinedTokens = 2;  // of all kernels that quantise

}  // namespace

int64_t joined_bytes(const zqfpLinearDesc& desc, int64_t m) {
  const int64_t shares = divide_up(desc.k, kBlockColumns);
  return shares * std::min(m, kMostJoinedTokens) * desc.lorc_rank * int64_t(sizeof(float));
}

zqfpStatus launch_joined(const zqfpLinearDesc& desc, const zqfpActivation& x, const zqfpLinearArgs& args, int64_t m,
                         uint32_t* counter, float* sums, void* stream, bool* launched) {
  *launched = false;
  if (!can_join(desc, x)) return ZQFP_SUCCESS;
  int device = 0, processors = 0;
  ZQFP_RETURN_IF_FAILED(find_device(&device, &processors));
  const Plan plan = make_quantized_plan(desc, m, processors, tuning);
  if (plan.kernel == nullptr) return ZQFP_SUCCESS;
  *launched = true;
  QuantizedStripParams p{};
  fill_strip_params(desc, args, m, plan.schedule, &p);
  static_cast<QuantizeInputs&>(p.from) = {x.x, x.other, x.gamma, x.epsilon, x.sum};
  p.from.scale = x.scale;
  p.from.m = int(m);
  p.from.k = int(desc.k);
  p.from.v = x.v;
  p.source = x.source;
  p.u = args.u;
  p.rank = desc.lorc_rank;
  p.shares = counter;
  p.slots = sums;
  const int before = bytes_before(x, stream, p.blocks);
  const int bytes = int(asked_shared_bytes(strip_shared_bytes(*plan.kernel, desc), before));
  p.waits = before > 0;
  ZQFP_RETURN_IF_FAILED(launch_gemm(*plan.kernel, p.blocks, bytes, device, &p, stream));
  predecessor = {launch_count(), stream, p.blocks, bytes, {}};
  std::copy(p.outputs, p.outputs + kMaxOutputs, predecessor.outputs);
  return ZQFP_SUCCESS;
}

}  // namespace zqfp

using namespace zqfp;

zqfpStatus zqfpGetWorkspaceSize(const zqfpLinearDesc* desc, int64_t m, size_t* bytes) {
  ZQFP_RETURN_IF_FAILED(check_desc(desc));
  ZQFP_RETURN_IF_FAILED(check_tokens(m));
  ZQFP_RETURN_IF_FAILED(check_plan(*desc, m));
  if (bytes == nullptr) return fail(ZQFP_INVALID_VALUE, "the result pointer is null");
  *bytes = workspace_bytes(*desc, m, tuning);
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpLinear(const zqfpLinearDesc* desc, const zqfpLinearArgs* args, int64_t m, void* workspace,
                      size_t workspace_size, void* stream) {
  ZQFP_RETURN_IF_FAILED(check_desc(desc));
  ZQFP_RETURN_IF_FAILED(check_tokens(m));
  ZQFP_RETURN_IF_FAILED(check_plan(*desc, m));
  if (m == 0) return ZQFP_SUCCESS;
  ZQFP_RETURN_IF_FAILED(check_args(*desc, args));
  ZQFP_RETURN_IF_FAILED(check_pointer(workspace, "the workspace"));
  const size_t needed = workspace_bytes(*desc, m, tuning);
  if (workspace_size < needed) {
    return fail(ZQFP_WORKSPACE_TOO_SMALL, "the workspace has %zu bytes, %zu are needed", workspace_size, needed);
  }
  int device = 0, processors = 0;
  ZQFP_RETURN_IF_FAILED(find_device(&device, &processors));
  const Plan plan = make_plan(*desc, m, processors, tuning);
  if (plan.kernel == nullptr) return no_kernel(*desc);
  return plan.kernel->strips ? launch_given_strips(*desc, *args, m, plan, device, stream)
                             : launch_tiles(*desc, *args, m, plan, device, workspace, stream);
}

const char* zqfpGetKernelName(int index) {
  const KernelTable table = kernels_of(64);
  return index >= 0 && index < table.count ? table.kernels[index].name : nullptr;
}

zqfpStatus zqfpTune(int index, int cut, int overlap) {
  if (index < -1 || index >= kernels_of(64).count) return fail(ZQFP_INVALID_VALUE, "there is no kernel %d", index);
  if (cut < -1 || cut > 1) return fail(ZQFP_INVALID_VALUE, "cut = %d is not -1, 0 or 1", cut);
  if (overlap < -1 || overlap > 1) return fail(ZQFP_INVALID_VALUE, "overlap = %d is not -1, 0 or 1", overlap);
  overlap_kernels = overlap < 0 ? kOverlapByDefault : overlap == 1;
  tuning = {index, cut < 0 ? Cut::kAuto : cut == 0 ? Cut::kNever : Cut::kAlways};
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpDescribePlan(const zqfpLinearDesc* desc, int64_t m, int processors, int32_t plan[6]) {
  ZQFP_RETURN_IF_FAILED(check_desc(desc));
  ZQFP_RETURN_IF_FAILED(check_tokens(m));
  ZQFP_RETURN_IF_FAILED(check_plan(*desc, m));
  if (m == 0 || processors < 2 || plan == nullptr) return fail(ZQFP_INVALID_VALUE, "nothing to plan");
  const Plan made = make_plan(*desc, m, processors, tuning);
  if (made.kernel == nullptr) return no_kernel(*desc);
  const Schedule& s = made.schedule;
  const int32_t numbers[6] = {int32_t(made.kernel - kernels_of(desc->group_size).kernels),
                              s.workers,
                              s.row_tiles,
                              s.token_tiles,
                              s.units,
                              s.whole_tiles};
  for (int i = 0; i < 6; ++i) plan[i] = numbers[i];
  return ZQFP_SUCCESS;
}
