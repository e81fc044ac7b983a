// plugin_calls LIBRARY FOLDER: what TensorRT does with our plugins when it runs an engine, on host memory.
//
// Makes both plugins of one product from the attributes in FOLDER/attributes (lines "name value ..."; m is the
// harness's own), serialises and makes them again for run time, attaches them to a context, and enqueues quantiser and
// linear on the tensors FOLDER/*.bin. Writes FOLDER/y.bin, one output after the other. Prints a line and returns 1 when
// enqueue fails.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;
using Attributes = std::map<std::string, std::vector<int32_t>>;
using Bytes = std::vector<char>;

std::string folder;

Bytes read(const std::string& name) {
  std::ifstream file(folder + "/" + name + ".bin", std::ios::binary);
  return Bytes{std::istreambuf_iterator<char>(file), {}};
}

IPluginCreatorV3One* creator(void* library, const char* name) {
  auto getCreators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  int32_t count = 0;
  IPluginCreatorInterface* const* all = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::strcmp(one->getPluginName(), name) == 0) return one;
  }
  std::fprintf(stderr, "no creator %s\n", name);
  std::exit(2);
}

// The plugin as it is after an engine was saved and loaded, attached to a context.
IPluginV3OneRuntime* make(void* library, const char* name, const Attributes& attributes) {
  std::vector<PluginField> fields;
  for (const auto& [key, values] : attributes) {
    fields.emplace_back(key.c_str(), values.data(), PluginFieldType::kINT32, int32_t(values.size()));
  }
  const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
  IPluginCreatorV3One* maker = creator(library, name);
  IPluginV3* built = maker->createPlugin("p", &given, TensorRTPhase::kBUILD);
  if (built == nullptr) std::exit(2);
  auto runtime = [](IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  };
  IPluginV3* loaded = maker->createPlugin("p", runtime(built)->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  IPluginV3* attached = runtime(loaded->clone())->attachToContext(nullptr);
  delete built;
  delete loaded;
  return runtime(attached);
}

int main(int, char** arguments) {
  folder = arguments[2];
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  Attributes attributes;
  std::ifstream lines(folder + "/attributes");
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    for (int32_t number; words >> number;) attributes[name].push_back(number);
  }
  const auto number = [&](const char* name) { return attributes.at(name).at(0); };
  const int64_t m = number("m"), n = number("n"), k = number("k");
  const int32_t tokens = number("per_token"), rank = number("lorc_rank"), bias = number("bias");

  const Bytes x = read("x"), v = read("v"), codes = read("codes"), scales = read("scales"), rows = read("rows");
  const Bytes b = read("bias"), u = read("u");
  Bytes a = read("a"), x8(m * k), xv(m * rank * 2), y(m * n * 2);
  if (tokens) a.resize(m * 4);

  // Two dimensions of rows: the plugin multiplies them.
  PluginTensorDesc activation{};
  activation.dims = Dims{3, {1, m, k}};
  activation.type = DataType::kHALF;
  std::vector<const void*> in{x.data()};
  std::vector<void*> out{x8.data()};
  (tokens ? (void)out.push_back(a.data()) : (void)in.push_back(a.data()));
  if (rank > 0) in.push_back(v.data());
  if (rank > 0) out.push_back(xv.data());
  const char* quantizer = tokens ? "QuantizeTokens" : "QuantizeActivation";
  const Attributes own{{"lorc_rank", {rank}}};
  if (make(library, quantizer, own)->enqueue(&activation, nullptr, in.data(), out.data(), nullptr, nullptr)) return 1;

  activation.type = DataType::kFP8;
  in = {x8.data(), a.data(), codes.data(), scales.data(), rows.data()};
  if (bias) in.push_back(b.data());
  if (rank > 0) in.insert(in.end(), {xv.data(), u.data()});
  out.clear();
  char* next = y.data();
  const int32_t columns = attributes.count("gated") ? number("n") / 2 : number("n");
  for (const int64_t size : attributes.count("output_n") ? attributes["output_n"] : std::vector<int32_t>{columns}) {
    out.push_back(next);
    next += m * size * 2;
  }
  IPluginV3OneRuntime* linear = make(library, "PackedW4A8Linear", attributes);
  for (int again = 0; again < 2; ++again) {
    if (linear->enqueue(&activation, nullptr, in.data(), out.data(), nullptr, nullptr)) return 1;
  }
  std::ofstream(folder + "/y.bin", std::ios::binary).write(y.data(), next - y.data());
  return 0;
}
