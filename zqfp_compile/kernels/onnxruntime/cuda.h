// The kernels of the CUDA execution provider: libzqfp on ONNX Runtime's stream.
#ifndef ZQFP_ORT_CUDA_H
#define ZQFP_ORT_CUDA_H

#include <memory>

#include "library.h"
#include "linear.h"
#include "quantize.h"
#include "quantized_linear.h"
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

// A quantiser; `arguments` go to its node.
class CudaQuantizer {
 public:
  template <typename... Arguments>
  explicit CudaQuantizer(const Ort::ConstKernelInfo& info, Arguments... arguments) : node_(info, arguments...) {
    checkCounts(info, node_.name(), node_.inputs(), node_.outputs());
    library();  // a missing library shows when the session opens
  }
  void compute(Ort::KernelContext& context) const;

 private:
  QuantizeNode node_;
};

class CudaQuantizedLinear {
 public:
  explicit CudaQuantizedLinear(const Ort::ConstKernelInfo& info);
  void compute(Ort::KernelContext& context) const;

 private:
  QuantizedLinearNode node_;
  std::shared_ptr<Workspaces> workspaces_;
};

}  // namespace zqfp

#endif
