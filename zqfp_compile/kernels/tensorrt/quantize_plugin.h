// zqfp::QuantizeActivation (x, a, v?) -> x8, xv? and zqfp::QuantizeTokens (x, v?) -> x8, a, xv? in TensorRT.
#ifndef ZQFP_TRT_QUANTIZE_PLUGIN_H
#define ZQFP_TRT_QUANTIZE_PLUGIN_H

#include "plugin.h"

namespace zqfp {

class QuantizePlugin : public Plugin {
 public:
  static constexpr char kStaticName[] = "QuantizeActivation";
  static constexpr char kTokensName[] = "QuantizeTokens";
  static constexpr const char* kAttributes[] = {"lorc_rank"};

  QuantizePlugin(bool tokens, const Attributes& attributes);

  QuantizePlugin* clone() noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1 + tokens_ + (rank_ > 0); }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t outputs, const nvinfer1::DataType* inputTypes,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputShapes, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputShapes, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDescs, const nvinfer1::PluginTensorDesc* outputDescs,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 protected:
  bool supportsType(int32_t position, nvinfer1::DataType type, nvinfer1::DataType first,
                    int32_t inputs) const override;

 private:
  bool tokens_;
  int32_t rank_;
};

}  // namespace zqfp

#endif
