#include "cuda.h"

#include "library.h"

namespace zqfp {

CudaLinear::CudaLinear(const Ort::ConstKernelInfo& info) : node_(info), workspaces_(Workspaces::shared()) {
  require(node_.desc.dtype != ZQFP_FLOAT32,
          "the CUDA kernel computes FLOAT16 and BFLOAT16, this layer is FLOAT; compile a model of one of those "
          "types, or run this one on the CPU");
  size_t codes = 0, scales = 0;
  check(library().packedSizes(&node_.desc, &codes, &scales), "PackedW4A8Linear");
  // The weights are on the GPU already, but their shapes are known here.
  const size_t given = info.GetInputTypeInfo(2).GetTensorTypeAndShapeInfo().GetElementCount();
  require(given == 2 * codes, "codes have " + std::to_string(given) + " elements, this layer has " +
                                  std::to_string(2 * codes) + "; compile the model again");
}

void CudaLinear::compute(Ort::KernelContext& context) const {
  const LinearCall call(node_, context);
  if (call.m == 0) return;
  void* stream = context.GetGPUComputeStream();
  size_t bytes = 0;
  check(library().workspaceSize(&node_.desc, call.m, &bytes), "PackedW4A8Linear");
  const Buffer workspace = workspaces_->get(stream, bytes);
  check(library().linear(&node_.desc, &call.args, call.m, workspace.data, workspace.bytes, stream),
        "PackedW4A8Linear");
}

CudaQuantizer::CudaQuantizer(const Ort::ConstKernelInfo& info, bool tokens) : node_(info, tokens) {
  library();  // a missing library shows when the session opens
}

void CudaQuantizer::compute(Ort::KernelContext& context) const {
  const QuantizeCall call(node_, context);
  if (call.m == 0) return;
  check(library().quantizeActivation(call.x, call.type, call.m, call.k, call.scale, call.x8, call.a, call.v,
                                     static_cast<int32_t>(node_.rank), call.xv, context.GetGPUComputeStream()),
        "QuantizeActivation");
}

}  // namespace zqfp
