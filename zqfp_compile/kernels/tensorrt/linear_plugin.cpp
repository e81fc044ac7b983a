#include "linear_plugin.h"

#include <new>
#include <stdexcept>

#include "library.h"

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
}

LinearPlugin* LinearPlugin::clone() noexcept { return new (std::nothrow) LinearPlugin(*this); }

int32_t LinearPlugin::getOutputDataTypes(DataType* outputTypes, int32_t outputs, const DataType*,
                                         int32_t inputs) const noexcept {
  if (outputs != 1 || inputs != inputCount()) {
    report(kName, "the number of inputs does not fit the attributes bias and lorc_rank");
    return 1;
  }
  outputTypes[0] = type_;
  return 0;
}

int32_t LinearPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputShapes, int32_t, const nvinfer1::DimsExprs*,
                                      int32_t, nvinfer1::DimsExprs* outputShapes, int32_t,
                                      nvinfer1::IExprBuilder& builder) noexcept {
  outputShapes[0] = inputShapes[0];
  if (outputShapes[0].nbDims < 1) return 1;
  outputShapes[0].d[outputShapes[0].nbDims - 1] = builder.constant(desc_.n);
  return 0;
}

bool LinearPlugin::supportsType(int32_t position, DataType type, DataType, int32_t inputs) const {
  static constexpr DataType kFixed[] = {DataType::kFP8, DataType::kFLOAT, DataType::kINT4, DataType::kFP8,
                                        DataType::kFLOAT};
  return type == (position < 5 && position < inputs ? kFixed[position] : type_);
}

void LinearPlugin::run(int64_t m, const void* const* inputs, void* output, cudaStream_t stream) {
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
  args.y = output;
  size_t bytes = 0;
  check(library().workspaceSize(&desc_, m, &bytes), kName);
  const Buffer workspace = workspaces_->get(stream, bytes);
  check(library().linear(&desc_, &args, m, workspace.data, workspace.bytes, stream), kName);
}

int32_t LinearPlugin::enqueue(const nvinfer1::PluginTensorDesc* inputDescs, const nvinfer1::PluginTensorDesc*,
                              const void* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded(kName, [&] {
    const int64_t m = rowCount(inputDescs[0].dims);
    if (m > 0) run(m, inputs, outputs[0], stream);
  });
}

}  // namespace zqfp
