// zqfp::QuantizeSiluMul and zqfp::QuantizeRmsNorm: quantisers of what they compute from their operands.
#ifndef ZQFP_ORT_FUSED_H
#define ZQFP_ORT_FUSED_H

#include "quantize.h"

namespace zqfp {

struct SiluMulCall;
struct RmsNormCall;

// Operands: gate (the call's x) and up, of one shape.
struct SiluMulNode : QuantizeNode {
  using Call = SiluMulCall;
  static constexpr const char* kName = "QuantizeSiluMul";

  explicit SiluMulNode(const Ort::ConstKernelInfo& info);
};

struct SiluMulCall : QuantizeCall {
  const void* up;

  SiluMulCall(const SiluMulNode& node, Ort::KernelContext& context);
};

// Operands: x, gamma [k], and skip of x's shape where the attribute says so. The sum of x and skip is then the last
// output.
struct RmsNormNode : QuantizeNode {
  using Call = RmsNormCall;
  static constexpr const char* kName = "QuantizeRmsNorm";

  bool skip;
  float epsilon;

  explicit RmsNormNode(const Ort::ConstKernelInfo& info);
};

struct RmsNormCall : QuantizeCall {
  const void* gamma;
  const void* skip = nullptr;
  void* sum = nullptr;

  RmsNormCall(const RmsNormNode& node, Ort::KernelContext& context);
};

}  // namespace zqfp

#endif
