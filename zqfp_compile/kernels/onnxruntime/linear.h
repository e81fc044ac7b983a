// zqfp::PackedW4A8Linear: what its kernels for the CPU and for CUDA share.
#ifndef ZQFP_ORT_LINEAR_H
#define ZQFP_ORT_LINEAR_H

#include "api.h"

namespace zqfp {

// Inputs: x8, a, codes, group_scales, row_scales, then bias if there is one, then xv and u with LoRC.
struct LinearNode {
  zqfpLinearDesc desc{};
  bool bias = false;

  explicit LinearNode(const Ort::ConstKernelInfo& info);

  size_t inputCount() const { return 5 + bias + (desc.lorc_rank > 0 ? 2 : 0); }
};

// The tensors of one call, with shapes checked.
struct LinearCall {
  int64_t m = 0;
  zqfpLinearArgs args{};  // pointers of the execution provider's memory

  // Checks the inputs and makes the output. Throws Ort::Exception when a shape is wrong.
  LinearCall(const LinearNode& node, Ort::KernelContext& context);
};

}  // namespace zqfp

#endif
