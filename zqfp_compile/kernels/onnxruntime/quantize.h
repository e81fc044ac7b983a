// What the kernels of every quantiser, for the CPU and for CUDA, share; all of zqfp::QuantizeActivation's and
// zqfp::QuantizeTokens'.
#ifndef ZQFP_ORT_QUANTIZE_H
#define ZQFP_ORT_QUANTIZE_H

#include "api.h"

namespace zqfp {

struct QuantizeCall;

// Inputs: the operands, then a for a static scale, then v with LoRC. Outputs: x8, then a per token, then xv with LoRC,
// then others.
struct QuantizeNode {
  using Call = QuantizeCall;
  static constexpr const char* kName = "QuantizeActivation";

  bool tokens;
  int64_t rank;
  size_t operands;

  QuantizeNode(const Ort::ConstKernelInfo& info, bool perToken, size_t operandCount = 1, size_t otherOutputs = 0);

  size_t inputs() const { return operands + !tokens + (rank > 0); }
  size_t outputs() const { return size_t{1} + tokens + (rank > 0); }  // but for the others
};

// The tensors of one call, with shapes checked. x is the first operand.
struct QuantizeCall {
  int64_t m = 0, k = 0;
  Shape shape;
  ONNXTensorElementDataType element{};
  zqfpDataType type{};
  const void* x = nullptr;
  const float* scale = nullptr;  // static
  const void* v = nullptr;       // [k, rank]
  void* x8 = nullptr;
  float* a = nullptr;  // per token
  void* xv = nullptr;  // [m, rank]

  QuantizeCall(const QuantizeNode& node, Ort::KernelContext& context);

 protected:
  // An input that must have the type of x and the shape `wanted`.
  const void* own(Ort::KernelContext& context, size_t index, const Shape& wanted, const char* what) const;
};

}  // namespace zqfp

#endif
