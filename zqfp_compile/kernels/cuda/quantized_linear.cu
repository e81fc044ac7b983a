// zqfpQuantizedLinear: the quantizer and the linear layer in one kernel, or one after the other through the workspace.
#include <algorithm>

#include "check.h"
#include "launch.h"
#include "launch_joined.h"
#include "plan.h"
#include "quantize_activation.h"

namespace zqfp {
namespace {

// What the quantizer leaves for the GEMM, behind the GEMM's own workspace; or one kernel's blocks for each other.
struct Layout {
  size_t sums;
  size_t x8, a, xv;
  size_t end;
};

zqfpStatus lay_out(const zqfpLinearDesc* desc, int64_t m, Layout* layout) {
  constexpr int64_t kAlignment = 256;
  size_t linear = 0;
  ZQFP_RETURN_IF_FAILED(zqfpGetWorkspaceSize(desc, m, &linear));
  const auto behind = [](size_t at, int64_t bytes) {
    return size_t(divide_up(int64_t(at) + bytes, kAlignment) * kAlignment);
  };
  layout->sums = layout->x8 = behind(linear, 0);
  layout->a = behind(layout->x8, m * desc->k);
  layout->xv = behind(layout->a, 4 * (desc->per_token ? m : 1));
  layout->end = std::max(behind(layout->xv, 2 * m * desc->lorc_rank), behind(layout->sums, joined_bytes(*desc, m)));
  return ZQFP_SUCCESS;
}

zqfpStatus check_activation(const zqfpLinearDesc& desc, const zqfpActivation* activation) {
  if (activation == nullptr) return fail(ZQFP_INVALID_VALUE, "the activation is null");
  const zqfpActivation& x = *activation;
  if ((x.scale == nullptr) != (desc.per_token == 1)) {
    return fail(ZQFP_INVALID_VALUE, "a layer has a static scale or is per token: per_token = %d, scale at %p",
                desc.per_token, (const void*)x.scale);
  }
  if ((x.v == nullptr) != (desc.lorc_rank == 0)) {
    return fail(ZQFP_INVALID_VALUE, "lorc_rank = %d, v at %p", desc.lorc_rank, x.v);
  }
  if (x.v != nullptr && x.x_dtype != desc.dtype) {
    return fail(ZQFP_NOT_SUPPORTED, "x @ v has the type %d of x, the layer has %d", x.x_dtype, desc.dtype);
  }
  return ZQFP_SUCCESS;
}

}  // namespace
}  // namespace zqfp

using namespace zqfp;

zqfpStatus zqfpGetQuantizedWorkspaceSize(const zqfpLinearDesc* desc, int64_t m, size_t* bytes) {
  Layout layout{};
  ZQFP_RETURN_IF_FAILED(lay_out(desc, m, &layout));
  if (bytes == nullptr) return fail(ZQFP_INVALID_VALUE, "the result pointer is null");
  *bytes = layout.end;
  return ZQFP_SUCCESS;
}

zqfpStatus zqfpQuantizedLinear(const zqfpLinearDesc* desc, const zqfpActivation* activation, const zqfpLinearArgs* args,
                               int64_t m, void* workspace, size_t workspace_bytes, void* stream) {
  Layout layout{};
  ZQFP_RETURN_IF_FAILED(lay_out(desc, m, &layout));
  ZQFP_RETURN_IF_FAILED(check_activation(*desc, activation));
  if (m == 0) return ZQFP_SUCCESS;
  ZQFP_RETURN_IF_FAILED(check_operands(*activation));
  ZQFP_RETURN_IF_FAILED(check_layer_args(*desc, args));
  ZQFP_RETURN_IF_FAILED(check_pointer(workspace, "the workspace"));
  if (workspace_bytes < layout.end) {
    return fail(ZQFP_WORKSPACE_TOO_SMALL, "the workspace has %zu bytes, %zu are needed", workspace_bytes, layout.end);
  }
  char* const start = static_cast<char*>(workspace);
  bool launched = false;
  ZQFP_RETURN_IF_FAILED(launch_joined(*desc, *activation, *args, m, static_cast<uint32_t*>(workspace),
                                      reinterpret_cast<float*>(start + layout.sums), stream, &launched));
  if (launched) return ZQFP_SUCCESS;
  zqfpLinearArgs linear = *args;
  float* const a = desc->per_token ? reinterpret_cast<float*>(start + layout.a) : nullptr;
  void* const xv = start + layout.xv;
  ZQFP_RETURN_IF_FAILED(quantize_activation(*activation, m, desc->k, start + layout.x8, a, desc->lorc_rank,
                                            desc->lorc_rank == 0 ? nullptr : xv, stream));
  linear.x8 = start + layout.x8;
  linear.a = desc->per_token ? a : activation->scale;
  linear.xv = xv;
  return zqfpLinear(desc, &linear, m, workspace, layout.x8, stream);
}
