#include "linear_plugin.h"

#include <new>
#include <stdexcept>

#include "library.h"
#include "packed_sizes.h"

namespace zqfp {

using nvinfer1::DataType;

namespace {

// ONNX's element types.
constexpr int32_t kOnnxFloat16 = 10, kOnnxBfloat16 = 16;

DataType outputType(int32_t onnx) {
  if (onnx == kOnnxFloat16) return DataType::kHALF;
  if (onnx == kOnnxBfloat16) return DataType::kBF16;
  throw std::runtime_error("the kernel computes FLOAT16 and BFLOAT16, attribute dtype is " + std::to_string(onnx));
}

}  // namespace

LinearPlugin::LinearPlugin(const Attributes& attributes) : Plugin(kName, attributes) {
  desc_.n = attribute("n");
  desc_.k = attribute("k");
  desc_.group_size = attribute("group_size");
  desc_.lorc_rank = attribute("lorc_rank");
  desc_.per_token = attribute("per_token");
  bias_ = attribute("bias") != 0;
  type_ = outputType(attribute("dtype"));
  desc_.dtype = dataType(type_);
  if (desc_.n <= 0 || desc_.k <= 0) throw std::runtime_error("attributes n and k must be positive");
  setOutputs(desc_, list("output_n"));
  setGated(desc_, attribute("gated", 0));
  outputs_ = outputSizes(desc_);
}

LinearPlugin* LinearPlugin::clone() noexcept { return new (std::nothrow) LinearPlugin(*this); }

int32_t LinearPlugin::getOutputDataTypes(DataType* outputTypes, int32_t outputs, const DataType*,
                                         int32_t inputs) const noexcept {
  if (outputs != getNbOutputs() || inputs != inputCount()) {
    report(kName, "the number of inputs or outputs does not fit the attributes bias, lorc_rank and output_n");
    return 1;
  }
  for (int32_t i = 0; i < outputs; ++i) outputTypes[i] = type_;
  return 0;
}

int32_t LinearPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputShapes, int32_t, const nvinfer1::DimsExprs*,
                                      int32_t, nvinfer1::DimsExprs* outputShapes, int32_t outputs,
                                      nvinfer1::IExprBuilder& builder) noexcept {
  const int32_t last = inputShapes[0].nbDims - 1;
  if (last < 0 || outputs != getNbOutputs()) return 1;
  for (int32_t i = 0; i < outputs; ++i) {
    outputShapes[i] = inputShapes[0];
    outputShapes[i].d[last] = builder.constant(outputs_[i]);
  }
  return 0;
}

void LinearPlugin::checkShapes(const std::vector<nvinfer1::Dims>& inputs) const {
  const PackedSizes sizes = packedSizes(desc_);
  checkLast(inputs.at(0), desc_.k, "x8");
  if (desc_.per_token) checkLast(inputs.at(1), 1, "a");
  if (!desc_.per_token) checkElements(inputs.at(1), 1, "a");
  checkElements(inputs.at(2), 2 * sizes.codes, "codes");
  checkElements(inputs.at(3), sizes.scales, "group_scales");
  checkElements(inputs.at(4), desc_.n, "row_scales");
  if (bias_) checkElements(inputs.at(5), desc_.n, "bias");
  if (desc_.lorc_rank == 0) return;
  checkLast(inputs.at(5 + bias_), desc_.lorc_rank, "xv");
  checkElements(inputs.at(6 + bias_), desc_.lorc_rank * desc_.n, "lorc_u");
}

bool LinearPlugin::supportsType(int32_t position, DataType type, DataType, int32_t inputs) const {
  static constexpr DataType kFixed[] = {DataType::kFP8, DataType::kFLOAT, DataType::kINT4, DataType::kFP8,
                                        DataType::kFLOAT};
  return type == (position < 5 && position < inputs ? kFixed[position] : type_);
}

void LinearPlugin::run(int64_t m, const void* const* inputs, void* const* outputs, cudaStream_t stream) {
  if (workspaces_ == nullptr) workspaces_ = Workspaces::shared();
  zqfpLinearArgs args{};
  args.x8 = inputs[0];
  args.a = static_cast<const float*>(inputs[1]);
  args.codes = inputs[2];
  args.group_scales = inputs[3];
  args.row_scales = static_cast<const float*>(inputs[4]);
  int32_t next = 5;
  if (bias_) args.bias = inputs[next++];
  if (desc_.lorc_rank > 0) {
    args.xv = inputs[next];
    args.u = inputs[next + 1];
  }
  for (size_t i = 0; i < outputs_.size(); ++i) args.y[i] = outputs[i];
  size_t bytes = 0;
  check(library().workspaceSize(&desc_, m, &bytes), "workspace");
  const Buffer workspace = workspaces_->get(stream, bytes);
  check(library().linear(&desc_, &args, m, workspace.data, workspace.bytes, stream), "launch");
}

int32_t LinearPlugin::enqueue(const nvinfer1::PluginTensorDesc* inputDescs, const nvinfer1::PluginTensorDesc*,
                              const void* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded(kName, [&] {
    const int64_t m = rowCount(inputDescs[0].dims);
    if (m > 0) run(m, inputs, outputs, stream);
  });
}

}  // namespace zqfp
