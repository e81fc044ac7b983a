#include "cuda.h"

namespace zqfp {

namespace {

void checkElements(const Ort::ConstKernelInfo& info, size_t index, size_t wanted, const char* what) {
  const size_t given = info.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetElementCount();
  require(given == wanted, std::string(what) + " have " + std::to_string(given) + " elements, this layer has " +
                               std::to_string(wanted) + "; compile the model again");
}

// A weight is on the GPU already, but its shape is known when the session opens.
void checkLayer(const Ort::ConstKernelInfo& info, const LinearNode& node, const char* name) {
  require(node.desc.dtype != ZQFP_FLOAT32,
          "the CUDA kernel computes FLOAT16 and BFLOAT16, this layer is FLOAT; compile a model of one of those "
          "types, or run this one on the CPU");
  size_t codes = 0, scales = 0;
  check(library().packedSizes(&node.desc, &codes, &scales), name);
  checkElements(info, node.codes, 2 * codes, "codes");
  checkElements(info, node.codes + 1, scales, "group_scales");
}

zqfpStatus launch(const QuantizeNode& node, const QuantizeCall& call, const Quantized& to, void* stream) {
  const zqfpActivation& from = call.activation;
  const auto rank = static_cast<int32_t>(node.rank);
  switch (node.source) {
    case ZQFP_SILU_MUL:
      return library().quantizeSiluMul(from.x, from.other, from.x_dtype, call.m, call.k, from.scale, to.x8, to.a,
                                       from.v, rank, to.xv, stream);
    case ZQFP_RMS_NORM:
      return library().quantizeRmsNorm(from.x, from.other, from.gamma, from.epsilon, from.x_dtype, call.m, call.k,
                                       from.scale, to.x8, to.a, from.sum, from.v, rank, to.xv, stream);
    default:
      return library().quantizeActivation(from.x, from.x_dtype, call.m, call.k, from.scale, to.x8, to.a, from.v, rank,
                                          to.xv, stream);
  }
}

}  // namespace

CudaLinear::CudaLinear(const Ort::ConstKernelInfo& info) : node_(info), workspaces_(Workspaces::shared()) {
  checkLayer(info, node_, LinearNode::kName);
}

void CudaLinear::compute(Ort::KernelContext& context) const {
  const LinearCall call(node_, context);
  if (call.m == 0) return;
  void* stream = context.GetGPUComputeStream();
  size_t bytes = 0;
  check(library().workspaceSize(&node_.desc, call.m, &bytes), LinearNode::kName);
  const Buffer workspace = workspaces_->get(stream, bytes);
  check(library().linear(&node_.desc, &call.args, call.m, workspace.data, workspace.bytes, stream), LinearNode::kName);
}

void CudaQuantizer::compute(Ort::KernelContext& context) const {
  const QuantizeCall call(node_, context, node_.outputs() - 1);
  const Quantized to = makeOutputs(node_, call, context);
  if (call.m > 0) check(launch(node_, call, to, context.GetGPUComputeStream()), node_.name());
}

CudaQuantizedLinear::CudaQuantizedLinear(const Ort::ConstKernelInfo& info)
    : node_(info), workspaces_(Workspaces::shared()) {
  checkLayer(info, node_.linear, QuantizedLinearNode::kName);
}

void CudaQuantizedLinear::compute(Ort::KernelContext& context) const {
  const QuantizedLinearCall call(node_, context);
  const int64_t m = call.linear.m;
  if (m == 0) return;
  void* stream = context.GetGPUComputeStream();
  const zqfpLinearDesc& desc = node_.linear.desc;
  size_t bytes = 0;
  check(library().quantizedWorkspaceSize(&desc, m, &bytes), QuantizedLinearNode::kName);
  const Buffer workspace = workspaces_->get(stream, bytes);
  check(library().quantizedLinear(&desc, &call.quantizer.activation, &call.linear.args, m, workspace.data,
                                  workspace.bytes, stream),
        QuantizedLinearNode::kName);
}

}  // namespace zqfp
