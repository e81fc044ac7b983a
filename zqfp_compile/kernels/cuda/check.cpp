#include "check.h"

#include <cmath>
#include <cstdint>

namespace zqfp {
namespace {

zqfpStatus check_gated(const zqfpLinearDesc& d) {
  if (d.gated != 0 && d.gated != 1) return fail(ZQFP_INVALID_VALUE, "gated = %d is not 0 or 1", d.gated);
  if (d.gated == 0) return ZQFP_SUCCESS;
  if (d.n % kGatedRows != 0) {
    return fail(ZQFP_NOT_SUPPORTED, "n = %lld of a gated layer is not a multiple of 16", (long long)d.n);
  }
  if (d.outputs[0] != 0) return fail(ZQFP_NOT_SUPPORTED, "a gated layer has one output, outputs are given");
  return ZQFP_SUCCESS;
}

zqfpStatus check_outputs(const zqfpLinearDesc& d) {
  int64_t sum = 0;
  for (int i = 0; i < ZQFP_MAX_OUTPUTS; ++i) {
    const int64_t n = d.outputs[i];
    const bool last = i + 1 == ZQFP_MAX_OUTPUTS || d.outputs[i + 1] == 0;
    if (n < 0 || n > d.n || (n == 0 && !last)) {
      return fail(ZQFP_INVALID_VALUE, "outputs[%d] = %lld is no part of n = %lld", i, (long long)n, (long long)d.n);
    }
    if (!last && n % kOutputRows != 0) {
      return fail(ZQFP_NOT_SUPPORTED, "outputs[%d] = %lld is not a multiple of 64", i, (long long)n);
    }
    sum += n;
  }
  if (sum == 0 || sum == d.n) return ZQFP_SUCCESS;
  return fail(ZQFP_INVALID_VALUE, "the outputs have %lld features, n is %lld", (long long)sum, (long long)d.n);
}

}  // namespace

zqfpStatus check_dtype(int32_t dtype) {
  if (dtype >= ZQFP_FLOAT16 && dtype <= ZQFP_FLOAT32) return ZQFP_SUCCESS;
  return fail(ZQFP_INVALID_VALUE, "unknown dtype %d", dtype);
}

int count_outputs(const zqfpLinearDesc& desc) {
  int count = 1;
  while (count < ZQFP_MAX_OUTPUTS && desc.outputs[count] != 0) ++count;
  return count;
}

zqfpStatus check_desc(const zqfpLinearDesc* desc) {
  if (desc == nullptr) return fail(ZQFP_INVALID_VALUE, "the layer description is null");
  const zqfpLinearDesc& d = *desc;
  if (d.n <= 0 || d.n > kMaxRows) {
    return fail(ZQFP_INVALID_VALUE, "n = %lld is not in 1..%lld", (long long)d.n, (long long)kMaxRows);
  }
  if (d.k <= 0 || d.k > kMaxColumns) {
    return fail(ZQFP_INVALID_VALUE, "k = %lld is not in 1..%lld", (long long)d.k, (long long)kMaxColumns);
  }
  ZQFP_RETURN_IF_FAILED(check_dtype(d.dtype));
  if (d.per_token != 0 && d.per_token != 1) {
    return fail(ZQFP_INVALID_VALUE, "per_token = %d is not 0 or 1", d.per_token);
  }
  if (d.lorc_rank < 0) return fail(ZQFP_INVALID_VALUE, "lorc_rank = %d is negative", d.lorc_rank);
  if (d.group_size <= 0) return fail(ZQFP_INVALID_VALUE, "group_size = %d is not positive", d.group_size);

  if (d.n % 8 != 0) return fail(ZQFP_NOT_SUPPORTED, "n = %lld is not a multiple of 8", (long long)d.n);
  if (d.k % 16 != 0) return fail(ZQFP_NOT_SUPPORTED, "k = %lld is not a multiple of 16", (long long)d.k);
  if (d.group_size != 32 && d.group_size != 64 && d.group_size != 128) {
    return fail(ZQFP_NOT_SUPPORTED, "no kernel for groups of %d weights: there are 32, 64 and 128", d.group_size);
  }
  if (d.lorc_rank % 8 != 0 || d.lorc_rank > 64) {
    return fail(ZQFP_NOT_SUPPORTED, "no kernel for LoRC rank %d: multiples of 8 up to 64", d.lorc_rank);
  }
  if (d.dtype == ZQFP_FLOAT32) return fail(ZQFP_NOT_SUPPORTED, "no kernel for float32 outputs: float16 or bfloat16");
  ZQFP_RETURN_IF_FAILED(check_gated(d));
  return check_outputs(d);
}

zqfpStatus check_tokens(int64_t m) {
  if (m >= 0 && m <= kMaxTokens) return ZQFP_SUCCESS;
  return fail(ZQFP_INVALID_VALUE, "m = %lld is not in 0..%lld", (long long)m, (long long)kMaxTokens);
}

zqfpStatus check_alignment(const void* pointer, const char* name) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0) return ZQFP_SUCCESS;
  return fail(ZQFP_INVALID_VALUE, "%s at %p is not aligned to 16 bytes", name, pointer);
}

zqfpStatus check_pointer(const void* pointer, const char* name) {
  if (pointer == nullptr) return fail(ZQFP_INVALID_VALUE, "%s is null", name);
  return check_alignment(pointer, name);
}

zqfpStatus check_layer_args(const zqfpLinearDesc& desc, const zqfpLinearArgs* args) {
  if (args == nullptr) return fail(ZQFP_INVALID_VALUE, "the arguments are null");
  ZQFP_RETURN_IF_FAILED(check_pointer(args->codes, "codes"));
  ZQFP_RETURN_IF_FAILED(check_pointer(args->group_scales, "group_scales"));
  ZQFP_RETURN_IF_FAILED(check_pointer(args->row_scales, "row_scales"));
  for (int i = 0; i < count_outputs(desc); ++i) ZQFP_RETURN_IF_FAILED(check_pointer(args->y[i], "y"));
  ZQFP_RETURN_IF_FAILED(check_alignment(args->bias, "bias"));
  return desc.lorc_rank == 0 ? ZQFP_SUCCESS : check_pointer(args->u, "u");
}

zqfpStatus check_args(const zqfpLinearDesc& desc, const zqfpLinearArgs* args) {
  ZQFP_RETURN_IF_FAILED(check_layer_args(desc, args));
  ZQFP_RETURN_IF_FAILED(check_pointer(args->x8, "x8"));
  ZQFP_RETURN_IF_FAILED(check_pointer(args->a, "a"));
  return desc.lorc_rank == 0 ? ZQFP_SUCCESS : check_pointer(args->xv, "xv");
}

zqfpStatus check_operands(const zqfpActivation& activation) {
  const zqfpActivation& x = activation;
  ZQFP_RETURN_IF_FAILED(check_dtype(x.x_dtype));
  ZQFP_RETURN_IF_FAILED(check_alignment(x.scale, "scale"));
  switch (x.source) {
    case ZQFP_PLAIN:
      return check_pointer(x.x, "x");
    case ZQFP_SILU_MUL:
      ZQFP_RETURN_IF_FAILED(check_pointer(x.x, "gate"));
      return check_pointer(x.other, "up");
    case ZQFP_RMS_NORM:
      if (!(x.epsilon >= 0.f) || std::isinf(x.epsilon)) {
        return fail(ZQFP_INVALID_VALUE, "epsilon = %g is not a number from 0 on", double(x.epsilon));
      }
      ZQFP_RETURN_IF_FAILED(check_pointer(x.x, "x"));
      ZQFP_RETURN_IF_FAILED(check_alignment(x.other, "skip"));
      ZQFP_RETURN_IF_FAILED(check_pointer(x.gamma, "gamma"));
      return check_alignment(x.sum, "sum");
    default:
      return fail(ZQFP_INVALID_VALUE, "unknown source %d of an activation", x.source);
  }
}

}  // namespace zqfp
