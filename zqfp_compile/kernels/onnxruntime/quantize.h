// What the kernels of every quantiser, for the CPU and for CUDA, share: zqfp::QuantizeActivation, QuantizeTokens,
// QuantizeSiluMul and QuantizeRmsNorm.
#ifndef ZQFP_ORT_QUANTIZE_H
#define ZQFP_ORT_QUANTIZE_H

#include "api.h"

namespace zqfp {

// Inputs: the operands, then a for a static scale, then v with LoRC. Outputs: x8, then a per token, then xv with LoRC,
// then the sum of a norm's x and skip.
//
// Operands: x; gate and up; or x, gamma [k], and skip where the attribute says so.
struct QuantizeNode {
  zqfpSource source;
  bool tokens;
  int64_t rank;
  bool skip = false;
  float epsilon = 0;

  QuantizeNode(const Ort::ConstKernelInfo& info, zqfpSource from, bool perToken);
  // The attribute `tokens` says whether it is per token.
  QuantizeNode(const Ort::ConstKernelInfo& info, zqfpSource from) : QuantizeNode(info, from, flag(info, "tokens")) {}

  const char* name() const;
  size_t operands() const { return source == ZQFP_PLAIN ? 1 : size_t{2} + skip; }
  size_t inputs() const { return operands() + !tokens + (rank > 0); }
  size_t outputs() const { return size_t{1} + tokens + (rank > 0) + skip; }
};

// The operands of one call, with shapes checked.
struct QuantizeCall {
  int64_t m = 0, k = 0;
  Shape shape;                  // of x
  zqfpActivation activation{};  // pointers of the execution provider's memory

  // Makes the output `sumOutput` where there is a skip. Throws Ort::Exception when a shape is wrong.
  QuantizeCall(const QuantizeNode& node, Ort::KernelContext& context, size_t sumOutput);

  zqfpDataType type() const { return static_cast<zqfpDataType>(activation.x_dtype); }
};

// What a quantiser writes.
struct Quantized {
  void* x8 = nullptr;  // [m, k]
  float* a = nullptr;  // [m] per token, else null
  void* xv = nullptr;  // [m, rank] with LoRC, else null
};

// A quantiser's own outputs but for the sum.
Quantized makeOutputs(const QuantizeNode& node, const QuantizeCall& call, Ort::KernelContext& context);

}  // namespace zqfp

#endif
