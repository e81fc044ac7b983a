#include "plugin.h"

#include <cstdio>
#include <stdexcept>
#include <utility>

namespace zqfp {

using nvinfer1::DataType;

Plugin::Plugin(const char* name, Attributes attributes) : name_(name), attributes_(std::move(attributes)) {
  makeFields();
}

Plugin::Plugin(const Plugin& other)
    : nvinfer1::IPluginV3(other),
      nvinfer1::IPluginV3OneCore(other),
      nvinfer1::IPluginV3OneBuild(other),
      nvinfer1::IPluginV3OneRuntime(other),
      name_(other.name_),
      attributes_(other.attributes_) {
  makeFields();
}

void Plugin::makeFields() {
  for (const auto& [name, value] : attributes_) {
    list_.emplace_back(name.c_str(), &value, nvinfer1::PluginFieldType::kINT32, 1);
  }
  fields_.nbFields = static_cast<int32_t>(list_.size());
  fields_.fields = list_.data();
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

bool Plugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                       int32_t inputs, int32_t) noexcept {
  const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
  return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
         supportsType(position, tensor.type, tensors[0].desc.type, inputs);
}

int32_t Plugin::attribute(const char* name) const {
  const auto found = attributes_.find(name);
  if (found == attributes_.end()) throw std::runtime_error(std::string("the node has no attribute ") + name);
  return found->second;
}

void report(const char* name, const char* message) noexcept { std::fprintf(stderr, "%s: %s\n", name, message); }

zqfpDataType dataType(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return ZQFP_FLOAT16;
    case DataType::kBF16:
      return ZQFP_BFLOAT16;
    case DataType::kFLOAT:
      return ZQFP_FLOAT32;
    default:
      throw std::runtime_error("a tensor is no FLOAT, FLOAT16 or BFLOAT16");
  }
}

int64_t rowCount(const nvinfer1::Dims& dims) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
  return rows;
}

}  // namespace zqfp
