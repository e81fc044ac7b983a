// The kernels of the CUDA execution provider: libzqfp on ONNX Runtime's stream.
#ifndef ZQFP_ORT_CUDA_H
#define ZQFP_ORT_CUDA_H

#include <memory>

#include "fused.h"
#include "linear.h"
#include "workspaces.h"

namespace zqfp {

class CudaLinear {
 public:
  explicit CudaLinear(const Ort::ConstKernelInfo& info);
  void compute(Ort::KernelContext& context) const;

 private:
  LinearNode node_;
  std::shared_ptr<Workspaces> workspaces_;
};

class CudaQuantizer {
 public:
  CudaQuantizer(const Ort::ConstKernelInfo& info, bool tokens);
  void compute(Ort::KernelContext& context) const;

 private:
  QuantizeNode node_;
};

class CudaSiluMul {
 public:
  explicit CudaSiluMul(const Ort::ConstKernelInfo& info);
  void compute(Ort::KernelContext& context) const;

 private:
  SiluMulNode node_;
};

class CudaRmsNorm {
 public:
  explicit CudaRmsNorm(const Ort::ConstKernelInfo& info);
  void compute(Ort::KernelContext& context) const;

 private:
  RmsNormNode node_;
};

}  // namespace zqfp

#endif
