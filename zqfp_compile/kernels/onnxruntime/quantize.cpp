#include "quantize.h"

namespace zqfp {

QuantizeNode::QuantizeNode(const Ort::ConstKernelInfo& info, bool perToken, size_t operandCount, size_t otherOutputs)
    : tokens(perToken), rank(info.GetAttribute<int64_t>("lorc_rank")), operands(operandCount) {
  require(info.GetInputCount() == inputs() && info.GetOutputCount() == outputs() + otherOutputs,
          "a quantiser has " + std::to_string(info.GetInputCount()) + " inputs and " +
              std::to_string(info.GetOutputCount()) + " outputs, which its attributes do not allow");
}

QuantizeCall::QuantizeCall(const QuantizeNode& node, Ort::KernelContext& context) {
  const Ort::ConstValue input = context.GetInput(0);
  const auto info = input.GetTensorTypeAndShapeInfo();
  shape = info.GetShape();
  require(!shape.empty() && shape.back() > 0, "x has shape " + text(shape) + ", it needs a last dimension");
  element = info.GetElementType();
  type = dataType(element, "x");
  k = shape.back();
  m = rowCount(shape, k, "x");
  x = input.GetTensorRawData();
  if (!node.tokens) {
    const Ort::ConstValue value = context.GetInput(node.operands);
    const auto scaleInfo = value.GetTensorTypeAndShapeInfo();
    require(scaleInfo.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && scaleInfo.GetElementCount() == 1,
            "a static scale must be one FLOAT");
    scale = value.GetTensorData<float>();
  }
  x8 = context.GetOutput(0, shape).GetTensorMutableRawData();
  Shape narrow = shape;
  if (node.tokens) {
    narrow.back() = 1;
    a = context.GetOutput(1, narrow).GetTensorMutableData<float>();
  }
  if (node.rank == 0) return;
  v = own(context, node.inputs() - 1, {k, node.rank}, "lorc_v");
  narrow.back() = node.rank;
  xv = context.GetOutput(node.outputs() - 1, narrow).GetTensorMutableRawData();
}

const void* QuantizeCall::own(Ort::KernelContext& context, size_t index, const Shape& wanted, const char* what) const {
  const Ort::ConstValue value = context.GetInput(index);
  const auto info = value.GetTensorTypeAndShapeInfo();
  require(info.GetShape() == wanted && info.GetElementType() == element,
          std::string(what) + " has shape " + text(info.GetShape()) + ", it must be " + text(wanted) + " of x's type");
  return value.GetTensorRawData();
}

}  // namespace zqfp
