// zqfp::QuantizedW4A8Linear: a quantiser and the only linear layer that reads it, as one.
#ifndef ZQFP_ORT_QUANTIZED_LINEAR_H
#define ZQFP_ORT_QUANTIZED_LINEAR_H

#include "linear.h"
#include "quantize.h"

namespace zqfp {

// Inputs: those of the quantiser, which the attribute `source` names, then codes, group_scales, row_scales, then bias
// if there is one, then u with LoRC. Outputs: those of the layer, then the sum of a norm's x and skip.
struct QuantizedLinearNode {
  static constexpr const char* kName = "QuantizedW4A8Linear";

  QuantizeNode quantizer;
  LinearNode linear;

  explicit QuantizedLinearNode(const Ort::ConstKernelInfo& info);
};

// The tensors of one call; x8, a and xv of the layer are null.
struct QuantizedLinearCall {
  QuantizeCall quantizer;
  LinearCall linear;

  QuantizedLinearCall(const QuantizedLinearNode& node, Ort::KernelContext& context);
};

}  // namespace zqfp

#endif
