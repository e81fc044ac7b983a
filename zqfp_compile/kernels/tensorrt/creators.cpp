// The creators of our plugins, and the two functions TensorRT looks for in a plugin library.

#include <cstring>
#include <iterator>

#include "linear_plugin.h"
#include "quantize_plugin.h"

#define ZQFP_EXPORT extern "C" __attribute__((visibility("default")))

namespace zqfp {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// The parser converts an ONNX attribute to the type a creator names; what it serialised comes back as such.
Attributes read(const nvinfer1::PluginFieldCollection& fields) {
  Attributes attributes;
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (field.data == nullptr || field.length < 1) continue;
    if (field.type == PluginFieldType::kINT32) {
      const auto* values = static_cast<const int32_t*>(field.data);
      attributes[field.name] = {values, values + field.length};
    } else if (field.type == PluginFieldType::kINT64) {
      const auto* values = static_cast<const int64_t*>(field.data);
      attributes[field.name] = {values, values + field.length};
    }
  }
  return attributes;
}

class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  using Make = Plugin* (*)(const Attributes&);

  template <size_t count>
  Creator(const char* name, const char* const (&attributes)[count], Make make) : name_(name), make_(make) {
    for (const char* attribute : attributes) list_.emplace_back(attribute, nullptr, PluginFieldType::kINT32, 1);
    fields_.nbFields = static_cast<int32_t>(list_.size());
    fields_.fields = list_.data();
  }

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Plugin* plugin = nullptr;
    guarded(name_, [&] { plugin = make_(read(*fields)); });
    return plugin;
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const char* name_;
  Make make_;
  std::vector<PluginField> list_;
  nvinfer1::PluginFieldCollection fields_{};
};

}  // namespace
}  // namespace zqfp

// TensorRT calls it first. Its logger is not used: the finder's interface differs between versions 10 and 11.
ZQFP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

ZQFP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using zqfp::Attributes, zqfp::LinearPlugin, zqfp::Plugin, zqfp::QuantizePlugin;
  static zqfp::Creator linear(LinearPlugin::kName, LinearPlugin::kAttributes,
                              [](const Attributes& values) -> Plugin* { return new LinearPlugin(values); });
  static zqfp::Creator activation(QuantizePlugin::kStaticName, QuantizePlugin::kAttributes,
                                  [](const Attributes& values) -> Plugin* { return new QuantizePlugin(false, values); });
  static zqfp::Creator tokens(QuantizePlugin::kTokensName, QuantizePlugin::kAttributes,
                              [](const Attributes& values) -> Plugin* { return new QuantizePlugin(true, values); });
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&linear, &activation, &tokens};
  count = static_cast<int32_t>(std::size(creators));
  return creators;
}
