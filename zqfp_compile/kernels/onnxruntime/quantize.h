// zqfp::QuantizeActivation and zqfp::QuantizeTokens: what their kernels for the CPU and for CUDA share.
#ifndef ZQFP_ORT_QUANTIZE_H
#define ZQFP_ORT_QUANTIZE_H

#include "api.h"

namespace zqfp {

// Inputs: x, then a for a static scale, then v with LoRC. Outputs: x8, then a per token, then xv with LoRC.
struct QuantizeNode {
  bool tokens;
  int64_t rank;

  QuantizeNode(const Ort::ConstKernelInfo& info, bool perToken);
};

// The tensors of one call, with shapes checked.
struct QuantizeCall {
  int64_t m = 0, k = 0;
  zqfpDataType type{};
  const void* x = nullptr;
  const float* scale = nullptr;  // static
  const void* v = nullptr;       // [k, rank]
  void* x8 = nullptr;
  float* a = nullptr;  // per token
  void* xv = nullptr;  // [m, rank]

  QuantizeCall(const QuantizeNode& node, Ort::KernelContext& context);
};

}  // namespace zqfp

#endif
