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

class CpuQuantizer {
 public:
  CpuQuantizer(const Ort::ConstKernelInfo& info, bool tokens) : node_(info, tokens) {}
  void compute(Ort::KernelContext& context) const;

 private:
  QuantizeNode node_;
};

class CpuSiluMul {
 public:
  explicit CpuSiluMul(const Ort::ConstKernelInfo& info) : node_(info) {}
  void compute(Ort::KernelContext& context) const;

 private:
  SiluMulNode node_;
};

class CpuRmsNorm {
 public:
  explicit CpuRmsNorm(const Ort::ConstKernelInfo& info) : node_(info) {}
  void compute(Ort::KernelContext& context) const;

 private:
  RmsNormNode node_;
};

}  // namespace zqfp

#endif
