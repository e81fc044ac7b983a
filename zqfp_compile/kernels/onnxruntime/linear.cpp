#include "linear.h"

#include "packed_sizes.h"

namespace zqfp {
namespace {

constexpr size_t kX8 = 0, kScale = 1, kCodes = 2;  // of PackedW4A8Linear

int32_t attribute(const Ort::ConstKernelInfo& info, const char* name) {
  return static_cast<int32_t>(info.GetAttribute<int64_t>(name));
}

// 0 where the node has no such attribute.
int64_t gatedAttribute(const Ort::ConstKernelInfo& info) {
  int64_t gated = 0;
  const Ort::Status missing(Ort::GetApi().KernelInfoGetAttribute_int64(info, "gated", &gated));
  return missing.IsOK() ? gated : 0;
}

// Empty where the node has no such attribute: one output.
std::vector<int64_t> outputsAttribute(const Ort::ConstKernelInfo& info) {
  std::vector<int64_t> outputs(ZQFP_MAX_OUTPUTS + 1);
  size_t count = outputs.size();
  OrtStatus* status = Ort::GetApi().KernelInfoGetAttributeArray_int64(info, "output_n", outputs.data(), &count);
  const Ort::Status owner(status);
  outputs.resize(status == nullptr ? count : 0);
  return outputs;
}

Shape shapeOf(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

// An input with a fixed number of elements.
const void* fixed(Ort::KernelContext& context, size_t index, int64_t count, const char* what) {
  const Ort::ConstValue value = context.GetInput(index);
  const Shape shape = shapeOf(value);
  require(elements(shape) == count,
          std::string(what) + " has shape " + text(shape) + ", it must have " + std::to_string(count) + " elements");
  return value.GetTensorRawData();
}

// One of bias, xv and u, which have the type of y.
const void* own(Ort::KernelContext& context, size_t index, int64_t count, int32_t type, const char* what) {
  const auto info = context.GetInput(index).GetTensorTypeAndShapeInfo();
  require(dataType(info.GetElementType(), what) == type, std::string(what) + " does not have the type of the output");
  return fixed(context, index, count, what);
}

}  // namespace

LinearNode::LinearNode(const Ort::ConstKernelInfo& info) : LinearNode(info, kCodes) {
  checkCounts(info, kName, kCodes + 3 + bias + (desc.lorc_rank > 0 ? 2 : 0), outputs());
}

LinearNode::LinearNode(const Ort::ConstKernelInfo& info, size_t codesInput) : codes(codesInput) {
  desc.n = info.GetAttribute<int64_t>("n");
  desc.k = info.GetAttribute<int64_t>("k");
  desc.group_size = attribute(info, "group_size");
  desc.lorc_rank = attribute(info, "lorc_rank");
  desc.per_token = attribute(info, "per_token");
  desc.dtype = dataType(static_cast<ONNXTensorElementDataType>(attribute(info, "dtype")), "attribute dtype");
  bias = flag(info, "bias");
  require(desc.n > 0 && desc.k > 0, "attributes n and k must be positive");
  setOutputs(desc, outputsAttribute(info));
  setGated(desc, gatedAttribute(info));
}

size_t LinearNode::outputs() const { return outputSizes(desc).size(); }

LinearCall::LinearCall(const LinearNode& node, Ort::KernelContext& context) {
  const zqfpLinearDesc& desc = node.desc;
  const Ort::ConstValue x8 = context.GetInput(kX8);
  const Shape shape = shapeOf(x8);
  m = rowCount(shape, desc.k, "x8");
  args.x8 = x8.GetTensorRawData();
  args.a = static_cast<const float*>(fixed(context, kScale, desc.per_token ? m : 1, "a"));
  if (desc.lorc_rank > 0) {
    args.xv = own(context, context.GetInputCount() - 2, m * desc.lorc_rank, desc.dtype, "xv");
  }
  takeWeight(node, context);
  makeOutputs(node, context, shape);
}

LinearCall::LinearCall(const LinearNode& node, Ort::KernelContext& context, const Shape& x)
    : m(rowCount(x, node.desc.k, "x")) {
  takeWeight(node, context);
  makeOutputs(node, context, x);
}

void LinearCall::takeWeight(const LinearNode& node, Ort::KernelContext& context) {
  const zqfpLinearDesc& desc = node.desc;
  args.codes = context.GetInput(node.codes).GetTensorRawData();
  args.group_scales = context.GetInput(node.codes + 1).GetTensorRawData();
  args.row_scales = static_cast<const float*>(fixed(context, node.codes + 2, desc.n, "row_scales"));
  if (node.bias) args.bias = own(context, node.codes + 3, desc.n, desc.dtype, "bias");
  if (desc.lorc_rank == 0) return;
  args.u = own(context, context.GetInputCount() - 1, desc.lorc_rank * desc.n, desc.dtype, "lorc_u");
}

void LinearCall::makeOutputs(const LinearNode& node, Ort::KernelContext& context, Shape shape) {
  const std::vector<int64_t> sizes = outputSizes(node.desc);
  for (size_t i = 0; i < sizes.size(); ++i) {
    shape.back() = sizes[i];
    args.y[i] = context.GetOutput(i, shape).GetTensorMutableRawData();
  }
}

}  // namespace zqfp
