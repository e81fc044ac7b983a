// The kernels of the CUDA execution provider: libzqfp on ONNX Runtime's stream.
#ifndef ZQFP_ORT_CUDA_H
#define ZQFP_ORT_CUDA_H

#include <memory>

#include "fused.h"
#include "library.h"
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

// A quantiser whose node is a QuantizeNode, SiluMulNode or RmsNormNode; `arguments` go to the node.
template <typename Node>
class CudaQuantizer {
 public:
  template <typename... Arguments>
  explicit CudaQuantizer(const Ort::ConstKernelInfo& info, Arguments... arguments) : node_(info, arguments...) {
    library();  // a missing library shows when the session opens
  }
  void compute(Ort::KernelContext& context) const;

 private:
  Node node_;
};

}  // namespace zqfp

#endif
