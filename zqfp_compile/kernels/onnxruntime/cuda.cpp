#include "cuda.h"

namespace zqfp {

namespace {

// A weight is on the GPU already, but its shape is known here.
void checkElements(const Ort::ConstKernelInfo& info, size_t index, size_t wanted, const char* what) {
  const size_t given = info.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetElementCount();
  require(given == wanted, std::string(what) + " have " + std::to_string(given) + " elements, this layer has " +
                               std::to_string(wanted) + "; compile the model again");
}

int32_t rankOf(const QuantizeNode& node) { return static_cast<int32_t>(node.rank); }

zqfpStatus launch(const QuantizeNode& node, const QuantizeCall& call, void* stream) {
  return library().quantizeActivation(call.x, call.type, call.m, call.k, call.scale, call.x8, call.a, call.v,
                                      rankOf(node), call.xv, stream);
}

zqfpStatus launch(const SiluMulNode& node, const SiluMulCall& call, void* stream) {
  return library().quantizeSiluMul(call.x, call.up, call.type, call.m, call.k, call.scale, call.x8, call.a, call.v,
                                   rankOf(node), call.xv, stream);
}

zqfpStatus launch(const RmsNormNode& node, const RmsNormCall& call, void* stream) {
  return library().quantizeRmsNorm(call.x, call.skip, call.gamma, node.epsilon, call.type, call.m, call.k, call.scale,
                                   call.x8, call.a, call.sum, call.v, rankOf(node), call.xv, stream);
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

template <typename Node>
void CudaQuantizer<Node>::compute(Ort::KernelContext& context) const {
  const typename Node::Call call(node_, context);
  if (call.m > 0) check(launch(node_, call, context.GetGPUComputeStream()), Node::kName);
}

template class CudaQuantizer<QuantizeNode>;
template class CudaQuantizer<SiluMulNode>;
template class CudaQuantizer<RmsNormNode>;

}  // namespace zqfp
