// zqfp::PackedW4A8Linear: what its kernels for the CPU and for CUDA share, also with those of QuantizedW4A8Linear.
#ifndef ZQFP_ORT_LINEAR_H
#define ZQFP_ORT_LINEAR_H

#include "api.h"

namespace zqfp {

struct LinearNode {
  static constexpr const char* kName = "PackedW4A8Linear";

  zqfpLinearDesc desc{};
  bool bias = false;
  size_t codes;  // that input; group_scales, row_scales and, if there is one, bias follow it, with LoRC u is the last

  // PackedW4A8Linear: x8, a, codes, group_scales, row_scales, then bias if there is one, then xv and u with LoRC.
  explicit LinearNode(const Ort::ConstKernelInfo& info);
  // Another operator, with its own number of inputs and outputs.
  LinearNode(const Ort::ConstKernelInfo& info, size_t codesInput);

  size_t outputs() const;
};

// The tensors of one call, with shapes checked.
struct LinearCall {
  int64_t m = 0;
  zqfpLinearArgs args{};  // pointers of the execution provider's memory

  // Check the inputs and make the output. Throw Ort::Exception when a shape is wrong.
  LinearCall(const LinearNode& node, Ort::KernelContext& context);
  // Of an activation that is not quantised yet: x8, a and xv stay null.
  LinearCall(const LinearNode& node, Ort::KernelContext& context, const Shape& x);

 private:
  void takeWeight(const LinearNode& node, Ort::KernelContext& context);
  void makeOutputs(const LinearNode& node, Ort::KernelContext& context, Shape shape);
};

}  // namespace zqfp

#endif
