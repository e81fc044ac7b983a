// zqfpLinear and what belongs to it: plan, workspace, launch.
#include "check.h"
#include "device.h"
#include "params.h"
#include "plan.h"
#include "tuning.h"

namespace zqfp {
namespace {

Tuning tuning;

// Past the default limit of shared memory a kernel must ask for it, once per device.
zqfpStatus allow_shared_memory(const Kernel& kernel) {
  return check_cuda(
      cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
      "asking for shared memory");
}

zqfpStatus fill_maps(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, const Kernel& kernel,
                     GemmParams* p) {
  const int box_tokens = kernel.tokens / kernel.cluster;
  ZQFP_RETURN_IF_FAILED(make_map(&p->x8, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, args.x8, m, desc.k, box_tokens));
  if (desc.lorc_rank == 0) return ZQFP_SUCCESS;
  const CUtensorMapDataType type =
      desc.dtype == ZQFP_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  ZQFP_RETURN_IF_FAILED(make_map(&p->xv, type, 2, args.xv, m, desc.lorc_rank, box_tokens));
  return make_map(&p->u, type, 2, args.u, desc.lorc_rank, desc.n, kLorcStep);
}

void fill_params(const zqfpLinearDesc& desc, const zqfpLinearArgs& args, int64_t m, const Schedule& schedule,
                 void* workspace, GemmParams* p) {
  p->codes = static_cast<const uint8_t*>(args.codes);
  p->group_scales = static_cast<const uint8_t*>(args.group_scales);
  p->row_scales = args.row_scales;
  p->a = args.a;
  p->bias = args.bias;
  p->y = args.y;
  p->arrivals = static_cast<uint32_t*>(workspace);
  p->partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + arrivals_bytes());
  p->schedule = schedule;
  p->m = int(m);
  p->n = int(desc.n);
  p->row_blocks = int((desc.n + kBlockRows - 1) / kBlockRows);
  p->k_blocks = int((desc.k + kBlockColumns - 1) / kBlockColumns);
  p->lorc_steps = (desc.lorc_rank + kLorcStep - 1) / kLorcStep;
  p->per_token = desc.per_token != 0;
  p->bfloat = desc.dtype == ZQFP_BFLOAT16;
}

zqfpStatus launch(const Kernel& kernel, GemmParams& p, void* stream) {
  ZQFP_RETURN_IF_FAILED(allow_shared_memory(kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kernel.cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.schedule.workers * kernel.cluster);
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = kernel.cluster > 1 ? 1 : 0;
  void* arguments[] = {&p};
  return check_cuda(cudaLaunchKernelExC(&config, kernel.function, arguments), "launching the GEMM");
}

zqfpStatus check_plan(const zqfpLinearDesc& desc, int64_t m) {
  if (plan_fits(desc, m)) return ZQFP_SUCCESS;
  return fail(ZQFP_NOT_SUPPORTED, "%lld x %lld for %lld tokens is more than the kernels count", (long long)desc.n,
              (long long)desc.k, (long long)m);
}

}  // namespace
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
  GemmParams p{};
  ZQFP_RETURN_IF_FAILED(fill_maps(*desc, *args, m, *plan.kernel, &p));
  fill_params(*desc, *args, m, plan.schedule, workspace, &p);
  return launch(*plan.kernel, p, stream);
}

const char* zqfpGetKernelName(int index) {
  const KernelTable table = kernels_of(64);
  return index >= 0 && index < table.count ? table.kernels[index].name : nullptr;
}

zqfpStatus zqfpTune(int index, int cut) {
  if (index < -1 || index >= kernels_of(64).count) return fail(ZQFP_INVALID_VALUE, "there is no kernel %d", index);
  if (cut < -1 || cut > 1) return fail(ZQFP_INVALID_VALUE, "cut = %d is not -1, 0 or 1", cut);
  tuning = {index, cut < 0 ? Cut::kAuto : cut == 0 ? Cut::kNever : Cut::kAlways};
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpDescribePlan(const zqfpLinearDesc* desc, int64_t m, int processors, int32_t plan[6]) {
  ZQFP_RETURN_IF_FAILED(check_desc(desc));
  ZQFP_RETURN_IF_FAILED(check_tokens(m));
  ZQFP_RETURN_IF_FAILED(check_plan(*desc, m));
  if (m == 0 || processors < 2 || plan == nullptr) return fail(ZQFP_INVALID_VALUE, "nothing to plan");
  const Plan made = make_plan(*desc, m, processors, tuning);
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
