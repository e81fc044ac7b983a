// The kernels of the CUDA execution provider: libzqfp on ONNX Runtime's stream.
#ifndef ZQFP_ORT_CUDA_H
#define ZQFP_ORT_CUDA_H

#include <memory>

#include "linear.h"
#include "quantize.h"
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

}  // namespace zqfp

#endif
