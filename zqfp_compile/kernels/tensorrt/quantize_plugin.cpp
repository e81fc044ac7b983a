#include "quantize_plugin.h"

#include <new>

#include "library.h"

namespace zqfp {

using nvinfer1::DataType;

QuantizePlugin::QuantizePlugin(bool tokens, const Attributes& attributes)
    : Plugin(tokens ? kTokensName : kStaticName, attributes), tokens_(tokens), rank_(attribute("lorc_rank")) {}

QuantizePlugin* QuantizePlugin::clone() noexcept { return new (std::nothrow) QuantizePlugin(*this); }

int32_t QuantizePlugin::getOutputDataTypes(DataType* outputTypes, int32_t outputs, const DataType* inputTypes,
                                           int32_t inputs) const noexcept {
  if (outputs != getNbOutputs() || inputs != 1 + !tokens_ + (rank_ > 0)) {
    report(getPluginName(), "the number of inputs or outputs does not fit the attribute lorc_rank");
    return 1;
  }
  outputTypes[0] = DataType::kFP8;
  if (tokens_) outputTypes[1] = DataType::kFLOAT;
  if (rank_ > 0) outputTypes[outputs - 1] = inputTypes[0];
  return 0;
}

int32_t QuantizePlugin::getOutputShapes(const nvinfer1::DimsExprs* inputShapes, int32_t, const nvinfer1::DimsExprs*,
                                        int32_t, nvinfer1::DimsExprs* outputShapes, int32_t outputs,
                                        nvinfer1::IExprBuilder& builder) noexcept {
  const int32_t last = inputShapes[0].nbDims - 1;
  if (last < 0) return 1;
  for (int32_t i = 0; i < outputs; ++i) outputShapes[i] = inputShapes[0];
  if (tokens_) outputShapes[1].d[last] = builder.constant(1);
  if (rank_ > 0) outputShapes[outputs - 1].d[last] = builder.constant(rank_);
  return 0;
}

bool QuantizePlugin::supportsType(int32_t position, DataType type, DataType first, int32_t inputs) const {
  if (position == 0) return type == DataType::kHALF || type == DataType::kBF16 || type == DataType::kFLOAT;
  if (position < inputs) return type == (!tokens_ && position == 1 ? DataType::kFLOAT : first);
  if (position == inputs) return type == DataType::kFP8;
  return type == (tokens_ && position == inputs + 1 ? DataType::kFLOAT : first);
}

int32_t QuantizePlugin::enqueue(const nvinfer1::PluginTensorDesc* inputDescs, const nvinfer1::PluginTensorDesc*,
                                const void* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept {
  return guarded(getPluginName(), [&] {
    const nvinfer1::Dims& dims = inputDescs[0].dims;
    const int64_t m = rowCount(dims);
    if (m == 0) return;
    const auto* scale = tokens_ ? nullptr : static_cast<const float*>(inputs[1]);
    auto* a = tokens_ ? static_cast<float*>(outputs[1]) : nullptr;
    const void* v = rank_ > 0 ? inputs[tokens_ ? 1 : 2] : nullptr;
    void* xv = rank_ > 0 ? outputs[tokens_ ? 2 : 1] : nullptr;
    check(library().quantizeActivation(inputs[0], dataType(inputDescs[0].type), m, dims.d[dims.nbDims - 1], scale,
                                       outputs[0], a, v, rank_, xv, stream),
          getPluginName());
  });
}

}  // namespace zqfp
