// The kernels of the CPU execution provider: plain, for checks and for sessions without a GPU.
//
// A linear keeps its weight in FP8, one byte each, decoded once when the session opens.
#ifndef ZQFP_ORT_CPU_H
#define ZQFP_ORT_CPU_H

#include <memory>

#include "fused.h"
#include "linear.h"
#include "matrix.h"
#include "quantize.h"

namespace zqfp {

class CpuLinear {
 public:
  explicit CpuLinear(const Ort::ConstKernelInfo& info);
  void compute(Ort::KernelContext& context) const;

 private:
  LinearNode node_;
  std::unique_ptr<Fp8Matrix> weight_;
};

// A quantiser whose node is a QuantizeNode, SiluMulNode or RmsNormNode; `arguments` go to the node.
template <typename Node>
class CpuQuantizer {
 public:
  template <typename... Arguments>
  explicit CpuQuantizer(const Ort::ConstKernelInfo& info, Arguments... arguments) : node_(info, arguments...) {}
  void compute(Ort::KernelContext& context) const;

 private:
  Node node_;
};

}  // namespace zqfp

#endif
