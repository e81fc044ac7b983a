#include "quantize.h"

namespace zqfp {
namespace {

// An input that must have the element type and the shape given.
const void* own(Ort::KernelContext& context, size_t index, ONNXTensorElementDataType element, const Shape& wanted,
                const char* what) {
  const Ort::ConstValue value = context.GetInput(index);
  const auto info = value.GetTensorTypeAndShapeInfo();
  require(info.GetShape() == wanted && info.GetElementType() == element,
          std::string(what) + " has shape " + text(info.GetShape()) + ", it must be " + text(wanted) + " of x's type");
  return value.GetTensorRawData();
}

const float* staticScale(Ort::KernelContext& context, size_t index) {
  const Ort::ConstValue value = context.GetInput(index);
  const auto info = value.GetTensorTypeAndShapeInfo();
  require(info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && info.GetElementCount() == 1,
          "a static scale must be one FLOAT");
  return value.GetTensorData<float>();
}

}  // namespace

QuantizeNode::QuantizeNode(const Ort::ConstKernelInfo& info, zqfpSource from, bool perToken)
    : source(from), tokens(perToken), rank(info.GetAttribute<int64_t>("lorc_rank")) {
  if (source != ZQFP_RMS_NORM) return;
  skip = flag(info, "skip");
  epsilon = info.GetAttribute<float>("epsilon");
  require(epsilon >= 0, "attribute epsilon is " + std::to_string(epsilon) + ", it must not be negative");
}

const char* QuantizeNode::name() const {
  if (source == ZQFP_PLAIN) return tokens ? "QuantizeTokens" : "QuantizeActivation";
  return source == ZQFP_SILU_MUL ? "QuantizeSiluMul" : "QuantizeRmsNorm";
}

QuantizeCall::QuantizeCall(const QuantizeNode& node, Ort::KernelContext& context, size_t sumOutput) {
  const Ort::ConstValue input = context.GetInput(0);
  const auto info = input.GetTensorTypeAndShapeInfo();
  const ONNXTensorElementDataType element = info.GetElementType();
  shape = info.GetShape();
  require(!shape.empty() && shape.back() > 0, "x has shape " + text(shape) + ", it needs a last dimension");
  k = shape.back();
  m = rowCount(shape, k, "x");
  activation.source = node.source;
  activation.x_dtype = dataType(element, "x");
  activation.x = input.GetTensorRawData();
  activation.epsilon = node.epsilon;
  if (node.source == ZQFP_SILU_MUL) activation.other = own(context, 1, element, shape, "up");
  if (node.source == ZQFP_RMS_NORM) activation.gamma = own(context, 1, element, {k}, "gamma");
  if (!node.tokens) activation.scale = staticScale(context, node.operands());
  if (node.rank > 0) activation.v = own(context, node.inputs() - 1, element, {k, node.rank}, "lorc_v");
  if (!node.skip) return;
  activation.other = own(context, 2, element, shape, "skip");
  activation.sum = context.GetOutput(sumOutput, shape).GetTensorMutableRawData();
}

Quantized makeOutputs(const QuantizeNode& node, const QuantizeCall& call, Ort::KernelContext& context) {
  Quantized to;
  to.x8 = context.GetOutput(0, call.shape).GetTensorMutableRawData();
  Shape narrow = call.shape;
  narrow.back() = 1;
  if (node.tokens) to.a = context.GetOutput(1, narrow).GetTensorMutableData<float>();
  narrow.back() = node.rank;
  if (node.rank > 0) to.xv = context.GetOutput(size_t{1} + node.tokens, narrow).GetTensorMutableRawData();
  return to;
}

}  // namespace zqfp
