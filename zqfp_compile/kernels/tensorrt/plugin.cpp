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
  for (const auto& [name, values] : attributes_) {
    list_.emplace_back(name.c_str(), values.data(), nvinfer1::PluginFieldType::kINT32,
                       static_cast<int32_t>(values.size()));
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

int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept {
  return guarded(name_, [&] {
    std::vector<nvinfer1::Dims> dims;
    for (int32_t i = 0; i < count; ++i) dims.push_back(inputs[i].desc.dims);
    checkShapes(dims);
  });
}

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t count,
                              const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
  return guarded(name_, [&] {
    std::vector<nvinfer1::Dims> dims;
    for (int32_t i = 0; i < count; ++i) dims.push_back(inputs[i].dims);
    checkShapes(dims);
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                       int32_t inputs, int32_t) noexcept {
  const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
  return tensor.format == nvinfer1::TensorFormat::kLINEAR &&
         supportsType(position, tensor.type, tensors[0].desc.type, inputs);
}

int32_t Plugin::attribute(const char* name) const {
  const std::vector<int32_t> values = list(name);
  if (values.size() != 1) throw std::runtime_error(std::string("the node has no attribute ") + name);
  return values[0];
}

int32_t Plugin::attribute(const char* name, int32_t missing) const {
  return list(name).empty() ? missing : attribute(name);
}

std::vector<int32_t> Plugin::list(const char* name) const {
  const auto found = attributes_.find(name);
  return found == attributes_.end() ? std::vector<int32_t>() : found->second;
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

void checkLast(const nvinfer1::Dims& dims, int64_t wanted, const char* what) {
  const int64_t last = dims.nbDims > 0 ? dims.d[dims.nbDims - 1] : 0;
  if (last == wanted || last == -1) return;
  throw std::runtime_error(std::string("the last dimension of ") + what + " is " + std::to_string(last) +
                           ", the node's is " + std::to_string(wanted));
}

void checkElements(const nvinfer1::Dims& dims, int64_t wanted, const char* what) {
  int64_t count = 1;
  for (int32_t i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
  if (count == wanted) return;
  throw std::runtime_error(std::string(what) + " has " + std::to_string(count) + " elements, this layer has " +
                           std::to_string(wanted) + "; compile the model again");
}

int64_t rowCount(const nvinfer1::Dims& dims) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
  return rows;
}

}  // namespace zqfp
