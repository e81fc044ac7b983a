// zqfp::PackedW4A8Linear in TensorRT.
//
// Inputs: x8 FP8, a FLOAT, codes INT4, group_scales FP8, row_scales FLOAT, then bias, then xv and lorc_u, of y's type.
#ifndef ZQFP_TRT_LINEAR_PLUGIN_H
#define ZQFP_TRT_LINEAR_PLUGIN_H

#include <memory>

#include "plugin.h"
#include "workspaces.h"

namespace zqfp {

class LinearPlugin : public Plugin {
 public:
  static constexpr char kName[] = "PackedW4A8Linear";
  static constexpr const char* kAttributes[] = {"n",    "k",     "group_size", "lorc_rank", "per_token",
                                                "bias", "dtype", "output_n",   "gated"};

  // Throws std::runtime_error when the attributes describe no layer of the kernel's.
  explicit LinearPlugin(const Attributes& attributes);

  LinearPlugin* clone() noexcept override;
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(outputs_.size()); }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t outputs, const nvinfer1::DataType* inputTypes,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputShapes, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputShapes, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDescs, const nvinfer1::PluginTensorDesc* outputDescs,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 protected:
  void checkShapes(const std::vector<nvinfer1::Dims>& inputs) const override;
  bool supportsType(int32_t position, nvinfer1::DataType type, nvinfer1::DataType first,
                    int32_t inputs) const override;

 private:
  void run(int64_t m, const void* const* inputs, void* const* outputs, cudaStream_t stream);
  int32_t inputCount() const { return 5 + bias_ + (desc_.lorc_rank > 0 ? 2 : 0); }

  zqfpLinearDesc desc_{};
  std::vector<int64_t> outputs_;  // columns of each
  bool bias_;
  nvinfer1::DataType type_;
  std::shared_ptr<Workspaces> workspaces_;
};

}  // namespace zqfp

#endif
