#include "cuda.h"

#include "library.h"

namespace zqfp {

namespace {

// A weight is on the GPU already, but its shape is known here.
void checkElements(const Ort::ConstKernelInfo& info, size_t index, size_t wanted, const char* what) {
  const size_t given = info.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetElementCount();
  require(given == wanted, std::string(what) + " have " + std::to_string(given) + " elements, this layer has " +
                               std::to_string(wanted) + "; compile the model again");
}

}  // namespace

CudaLinear::CudaLinear(const Ort::ConstKernelInfo& info) : node_(info), workspaces_(Workspaces::shared()) {
  require(node_.desc.dtype != ZQFP_FLOAT32,
          "the CUDA kernel computes FLOAT16 and BFLOAT16, this layer is FLOAT; compile a model of one of those "
          "types, or run this one on the CPU");
  size_t codes = 0, scales = 0;
  check(library().packedSizes(&node_.desc, &codes, &scales), "PackedW4A8Linear");
  checkElements(info, 2, 2 * codes, "codes");
  checkElements(info, 3, scales, "group_scales");
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

CudaSiluMul::CudaSiluMul(const Ort::ConstKernelInfo& info) : node_(info) { library(); }

void CudaSiluMul::compute(Ort::KernelContext& context) const {
  const SiluMulCall call(node_, context);
  if (call.m == 0) return;
  check(library().quantizeSiluMul(call.x, call.up, call.type, call.m, call.k, call.scale, call.x8, call.a, call.v,
                                  static_cast<int32_t>(node_.rank), call.xv, context.GetGPUComputeStream()),
        "QuantizeSiluMul");
}

CudaRmsNorm::CudaRmsNorm(const Ort::ConstKernelInfo& info) : node_(info) { library(); }

void CudaRmsNorm::compute(Ort::KernelContext& context) const {
  const RmsNormCall call(node_, context);
  if (call.m == 0) return;
  check(library().quantizeRmsNorm(call.x, call.skip, call.gamma, node_.epsilon, call.type, call.m, call.k, call.scale,
                                  call.x8, call.a, call.sum, call.v, static_cast<int32_t>(node_.rank), call.xv,
                                  context.GetGPUComputeStream()),
        "QuantizeRmsNorm");
}

}  // namespace zqfp
