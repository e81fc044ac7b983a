// What both plugins share: one object that is plugin, core, build and runtime capability in one, and whose state is
// a few integers.
#ifndef ZQFP_TRT_PLUGIN_H
#define ZQFP_TRT_PLUGIN_H

#include <NvInferRuntime.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "zqfp.h"

namespace zqfp {

inline constexpr char kNamespace[] = "zqfp";
inline constexpr char kVersion[] = "1";

// Integer attributes of a node, by name: one number, or a list.
using Attributes = std::map<std::string, std::vector<int32_t>>;

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const char* name, Attributes attributes);
  Plugin(const Plugin& other);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t count, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_; }
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;

 protected:
  // Throws std::runtime_error when the inputs' shapes do not fit the attributes; -1 is an open dimension.
  virtual void checkShapes(const std::vector<nvinfer1::Dims>& inputs) const = 0;

  // Whether tensor `position` (inputs, then outputs) may have `type`, given the first input's.
  virtual bool supportsType(int32_t position, nvinfer1::DataType type, nvinfer1::DataType first, int32_t inputs) const = 0;

  // Throws std::runtime_error when the node has no such attribute, or it is a list.
  int32_t attribute(const char* name) const;

  // `missing` when the node has no such attribute. Throws std::runtime_error when it is a list.
  int32_t attribute(const char* name, int32_t missing) const;

  // Empty when the node has no such attribute.
  std::vector<int32_t> list(const char* name) const;

 private:
  void makeFields();

  const char* name_;
  Attributes attributes_;
  std::vector<nvinfer1::PluginField> list_;
  nvinfer1::PluginFieldCollection fields_{};
};

// Runs `body`, which may throw; says what went wrong on standard error and returns 1, else 0. TensorRT takes no
// exceptions, and its logger is out of reach: the interface that finds it differs between versions 10 and 11.
template <typename Body>
int32_t guarded(const char* name, Body&& body) noexcept;

void report(const char* name, const char* message) noexcept;

template <typename Body>
int32_t guarded(const char* name, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    report(name, error.what());
    return 1;
  }
}

// The type as libzqfp names it. Throws std::runtime_error for types it does not know.
zqfpDataType dataType(nvinfer1::DataType type);

// Rows of an activation: the product of all dimensions but the last.
int64_t rowCount(const nvinfer1::Dims& dims);

// Throws std::runtime_error unless the last dimension of `what` is `wanted` or open.
void checkLast(const nvinfer1::Dims& dims, int64_t wanted, const char* what);

// Throws std::runtime_error unless `what`, of which all dimensions are known, has `wanted` elements.
void checkElements(const nvinfer1::Dims& dims, int64_t wanted, const char* what);

}  // namespace zqfp

#endif
