// The kernels of the CPU execution provider: plain, for checks and for sessions without a GPU.
//
// A linear keeps its weight in FP8, one byte each, decoded once when the session opens.
#ifndef ZQFP_ORT_CPU_H
#define ZQFP_ORT_CPU_H

#include <memory>

#include "linear.h"
#include "matrix.h"
#include "quantize.h"
#include "quantized_linear.h"

namespace zqfp {

class CpuLinear {
 public:
  explicit CpuLinear(const Ort::ConstKernelInfo& info) : CpuLinear(info, LinearNode(info)) {}
  CpuLinear(const Ort::ConstKernelInfo& info, const LinearNode& node);
  void compute(Ort::KernelContext& context) const;
  void multiply(const LinearCall& call, Ort::KernelContext& context) const;

 private:
  LinearNode node_;
  std::unique_ptr<Fp8Matrix> weight_;
};

// A quantiser; `arguments` go to its node.
class CpuQuantizer {
 public:
  template <typename... Arguments>
  explicit CpuQuantizer(const Ort::ConstKernelInfo& info, Arguments... arguments) : node_(info, arguments...) {
    checkCounts(info, node_.name(), node_.inputs(), node_.outputs());
  }
  void compute(Ort::KernelContext& context) const;

 private:
  QuantizeNode node_;
};

class CpuQuantizedLinear {
 public:
  explicit CpuQuantizedLinear(const Ort::ConstKernelInfo& info) : node_(info), linear_(info, node_.linear) {}
  void compute(Ort::KernelContext& context) const;

 private:
  QuantizedLinearNode node_;
  CpuLinear linear_;
};

}  // namespace zqfp

#endif
