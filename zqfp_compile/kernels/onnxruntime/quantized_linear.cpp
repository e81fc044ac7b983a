#include "quantized_linear.h"

namespace zqfp {
namespace {

zqfpSource sourceOf(const Ort::ConstKernelInfo& info) {
  const auto source = info.GetAttribute<int64_t>("source");
  require(source >= ZQFP_PLAIN && source <= ZQFP_RMS_NORM,
          "attribute source is " + std::to_string(source) + ", it must be 1 (x), 2 (SiLU) or 3 (norm)");
  return static_cast<zqfpSource>(source);
}

// Inputs whose place varies have no declared type.
void checkType(const Ort::ConstKernelInfo& info, size_t index, ONNXTensorElementDataType wanted, const char* what) {
  const auto given = info.GetInputTypeInfo(index).GetTensorTypeAndShapeInfo().GetElementType();
  require(given == wanted, std::string(what) + " has element type " + std::to_string(given) + ", it must be " +
                               std::to_string(wanted));
}

}  // namespace

QuantizedLinearNode::QuantizedLinearNode(const Ort::ConstKernelInfo& info)
    : quantizer(info, sourceOf(info), flag(info, "per_token")), linear(info, quantizer.inputs()) {
  const size_t inputs = linear.codes + 3 + linear.bias + (quantizer.rank > 0);
  checkCounts(info, kName, inputs, linear.outputs() + quantizer.skip);
  checkType(info, linear.codes, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4, "codes");
  checkType(info, linear.codes + 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, "group_scales");
  checkType(info, linear.codes + 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "row_scales");
}

QuantizedLinearCall::QuantizedLinearCall(const QuantizedLinearNode& node, Ort::KernelContext& context)
    : quantizer(node.quantizer, context, node.linear.outputs()), linear(node.linear, context, quantizer.shape) {
  require(node.quantizer.rank == 0 || quantizer.type() == node.linear.desc.dtype,
          "x does not have the type of the output, with LoRC it must");
}

}  // namespace zqfp
