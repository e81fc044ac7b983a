#include "quantize.h"

namespace zqfp {

QuantizeNode::QuantizeNode(const Ort::ConstKernelInfo& info, bool perToken)
    : tokens(perToken), rank(info.GetAttribute<int64_t>("lorc_rank")) {
  const size_t wanted = 1 + !tokens + (rank > 0);
  require(info.GetInputCount() == wanted && info.GetOutputCount() == size_t{1} + tokens + (rank > 0),
          "a quantiser has " + std::to_string(info.GetInputCount()) + " inputs and " +
              std::to_string(info.GetOutputCount()) + " outputs, which its attribute lorc_rank does not allow");
}

QuantizeCall::QuantizeCall(const QuantizeNode& node, Ort::KernelContext& context) {
  const Ort::ConstValue input = context.GetInput(0);
  const auto info = input.GetTensorTypeAndShapeInfo();
  Shape shape = info.GetShape();
  require(!shape.empty() && shape.back() > 0, "x has shape " + text(shape) + ", it needs a last dimension");
  type = dataType(info.GetElementType(), "x");
  k = shape.back();
  m = rowCount(shape, k, "x");
  x = input.GetTensorRawData();
  if (!node.tokens) {
    const Ort::ConstValue value = context.GetInput(1);
    require(value.GetTensorTypeAndShapeInfo().GetElementCount() == 1, "a static scale has more than one element");
    scale = value.GetTensorData<float>();
  }
  x8 = context.GetOutput(0, shape).GetTensorMutableRawData();
  if (node.tokens) {
    shape.back() = 1;
    a = context.GetOutput(1, shape).GetTensorMutableData<float>();
  }
  if (node.rank == 0) return;
  const Ort::ConstValue factor = context.GetInput(node.tokens ? 1 : 2);
  const auto factorInfo = factor.GetTensorTypeAndShapeInfo();
  const Shape wanted{k, node.rank};
  require(factorInfo.GetShape() == wanted && factorInfo.GetElementType() == info.GetElementType(),
          "lorc_v has shape " + text(factorInfo.GetShape()) + ", it must be " + text(wanted) + " of x's type");
  v = factor.GetTensorRawData();
  shape.back() = node.rank;
  xv = context.GetOutput(node.tokens ? 2 : 1, shape).GetTensorMutableRawData();
}

}  // namespace zqfp
